"""Conversion of FP32 graphs to quantized graphs."""

from pathlib import Path

import numpy as np
import pytest

from sg_export.quantize.rewrite import reference_pipeline
from sg_runtime.bundle import Bundle
from sg_runtime.pipeline import Pipeline


@pytest.fixture
def reference(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_reference_pipeline_is_exact(reference: Bundle, tiny_bundle: Path) -> None:
    exact, own = Pipeline.load(tiny_bundle, "cpu"), reference_pipeline(reference)
    np.testing.assert_array_equal(own.sample([0], [1], steps=2), exact.sample([0], [1], steps=2))
