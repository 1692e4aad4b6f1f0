"""Building of TensorRT and TensorRT-RTX engines from ONNX graphs."""
