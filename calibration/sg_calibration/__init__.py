"""Calibration of INT8 and FP8: ranges of activations, and Q/DQ nodes in ONNX graphs."""
