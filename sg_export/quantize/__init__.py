"""INT8 and FP8: which layers, and whether the result is good enough."""
