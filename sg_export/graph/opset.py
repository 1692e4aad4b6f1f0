"""ONNX opsets of graphs."""

DEFAULT_OPSET = 20
OPSETS = (20, 21, 22)
"""Supported opsets.

From 20 on, Gelu is one operator. From 23 on, PyTorch emits an Attention operator that not every
backend builds in FP32.
"""

CONV_IN_BF16 = 22
"""First opset with a convolution in BF16, which decoders have."""
