"""The tiny model's FP32 bundle, as calibration uses it."""

from pathlib import Path

import onnx
import pytest

from sg_export.quantize.rewrite import reference_pipeline
from sg_runtime.bundle import Bundle
from sg_runtime.pipeline import Pipeline


@pytest.fixture(scope="session")
def reference(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="session")
def pipe(reference: Bundle) -> Pipeline:
    return reference_pipeline(reference)


@pytest.fixture
def guided(reference: Bundle) -> onnx.ModelProto:
    """A fresh copy of a guided graph, with its weights."""
    return onnx.load(reference.path / "graphs/guided-16-8.onnx")
