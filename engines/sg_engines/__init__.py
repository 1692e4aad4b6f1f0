"""ONNX graphs to engines that a backend runs."""
