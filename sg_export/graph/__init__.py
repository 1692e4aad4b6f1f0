"""ONNX graphs: specification, tracing, weights, types and checks."""
