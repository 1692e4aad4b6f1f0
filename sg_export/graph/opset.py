"""ONNX opsets that graphs can have."""

DEFAULT_OPSET = 20
OPSETS = (20, 21, 22)
"""From 20 on Gelu is one operator. From 23 on PyTorch emits an Attention that not every backend builds in FP32."""
