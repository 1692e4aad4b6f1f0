"""ONNX graph → ONNX graph with Q/DQ nodes, for INT8 and FP8."""
