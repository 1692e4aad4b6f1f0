"""Comparisons of a bundle with its checkpoint in PyTorch and with an FP32 bundle."""
