"""One command that checks this project on an NVIDIA GPU: `python -m benchmarks.gpu`.

Modules at the top of this package import neither torch nor ONNX Runtime nor any package of this
project. They work on every machine. `checks` holds what runs on the GPU, in processes of its own.
"""
