"""HTML page that compares bundles."""
