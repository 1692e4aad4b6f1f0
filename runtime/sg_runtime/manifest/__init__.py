"""The manifest of a bundle: its source, its content, and how to run it.

All records are frozen. Reading is strict.
"""

from sg_runtime.manifest.base import (
    ENGINE_NAMES,
    ENGINE_TARGETS,
    FLOAT32_MAX,
    FLOAT32_MIN,
    EngineLibrary,
    GraphKind,
    GuidanceMode,
    HalfPrecision,
    NetworkName,
    OnnxTarget,
    Precision,
    Prediction,
    QuantizedType,
    SamplerName,
)
from sg_runtime.manifest.files import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    FileFacts,
    Manifest,
    Source,
    adapter,
    json_schema,
    read_manifest,
    schema_of,
    write_manifest,
)
from sg_runtime.manifest.graphs import Cost, EngineFacts, GraphFacts, PassCost, Profile, TensorFacts
from sg_runtime.manifest.guidance import EVEN, MODES, GuidancePlan, Karras, Mode, Sampling, Shifted
from sg_runtime.manifest.model import Level, ModelFacts, Route
from sg_runtime.manifest.quantization import LayerChoice, QualityGates, Quantization, StratumQuality

__all__ = [
    "ENGINE_NAMES",
    "ENGINE_TARGETS",
    "EVEN",
    "FLOAT32_MAX",
    "FLOAT32_MIN",
    "MANIFEST_FILE",
    "MODES",
    "SCHEMA_VERSION",
    "Cost",
    "EngineFacts",
    "EngineLibrary",
    "FileFacts",
    "GraphFacts",
    "GraphKind",
    "GuidanceMode",
    "GuidancePlan",
    "HalfPrecision",
    "Karras",
    "LayerChoice",
    "Level",
    "Manifest",
    "Mode",
    "ModelFacts",
    "NetworkName",
    "OnnxTarget",
    "PassCost",
    "Precision",
    "Prediction",
    "Profile",
    "QualityGates",
    "Quantization",
    "QuantizedType",
    "Route",
    "SamplerName",
    "Sampling",
    "Shifted",
    "Source",
    "StratumQuality",
    "TensorFacts",
    "adapter",
    "json_schema",
    "read_manifest",
    "schema_of",
    "write_manifest",
]
