"""The torch-free runtime of sg-export: samples images from bundles with Sparse Guidance."""

import os

# ONNX Runtime has telemetry that is on by default. It reads this variable when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from sg_runtime.backends import BACKENDS, choose_backend
from sg_runtime.bundle import Bundle
from sg_runtime.errors import SgError
from sg_runtime.manifest import GuidancePlan, Level, Manifest
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.prepared import PreparedRun
from sg_runtime.sampling import Churn

__version__ = "0.1.0.dev0"

__all__ = [
    "BACKENDS",
    "Bundle",
    "Churn",
    "GuidancePlan",
    "Level",
    "Manifest",
    "Pipeline",
    "PreparedRun",
    "SgError",
    "choose_backend",
]
