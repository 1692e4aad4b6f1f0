"""Calibration of INT8 and FP8: ranges of activations, and Q/DQ nodes in ONNX graphs."""

import sg_runtime  # noqa: F401  # turns the telemetry of ONNX Runtime off
