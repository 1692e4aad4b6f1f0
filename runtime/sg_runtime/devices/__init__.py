"""Memory and GPUs: NumPy, the CUDA driver, DLPack."""
