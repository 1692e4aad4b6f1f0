"""Quantization to INT8 and FP8: choice of layers, and the gates on quality."""
