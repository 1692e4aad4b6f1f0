"""The checks of each part. A check is a function of a `Context` that yields findings."""
