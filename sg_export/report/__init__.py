"""The page that compares bundles."""
