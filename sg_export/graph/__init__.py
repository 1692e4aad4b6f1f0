"""ONNX graphs: what they are, tracing, weights, types and checks."""
