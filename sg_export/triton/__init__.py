"""Model repositories for NVIDIA's Triton Inference Server, whose Python backend runs a bundle."""

from sg_export.triton.config import Settings, model_config
from sg_export.triton.repository import write_repository

__all__ = ["Settings", "model_config", "write_repository"]
