"""Bundles in the form for ONNX Runtime's CUDA provider: verify and run them without a GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sg_export.cli import main
from sg_export.options.types import BASES
from sg_export.parity.verify import verify
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError
from sg_runtime.manifest import Precision
from sg_runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow

PRECISIONS: list[Precision] = ["fp32", "fp16", "bf16"]


@pytest.fixture(scope="module", params=PRECISIONS)
def cuda_bundle(request: pytest.FixtureRequest, build_once: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """The tiny model in the form for CUDA for one image, next to its checkpoint."""
    options = {"sparsity": (0.5,), "precision": request.param, "batch": 1, "onnx_target": "onnxruntime-cuda"}
    return build_once(f"tiny-cuda-{request.param}-bundle", tiny_checkpoint, **options)


def test_verify_of_graphs_for_cuda_passes_on_the_cpu(cuda_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(cuda_bundle).manifest
    assert manifest.onnx_target == "onnxruntime-cuda"
    parity = verify(cuda_bundle, times=(0.5,), save_polygraphy=tmp_path)
    assert parity.passed
    assert {one.gate for one in parity.comparisons} <= {
        BASES[manifest.precision].gates.graph,
        BASES[manifest.precision].gates.run,
    }
    # Polygraphy runs the graphs as they are, which the CPU provider can in FP32.
    assert len(parity.commands) == (len(manifest.graphs) if manifest.precision == "fp32" else 0)


def test_pipeline_runs_graphs_for_cuda_on_the_cpu_in_fp32_alone(cuda_bundle: Path) -> None:
    if Bundle.open(cuda_bundle).manifest.precision == "fp32":
        assert np.isfinite(Pipeline.load(cuda_bundle, "cpu").sample([0], seeds=[0], steps=2)).all()
    else:
        with pytest.raises(BundleError, match=r"in the form for ONNX Runtime's CUDA provider in (FP|BF)16, which onnx"):
            Pipeline.load(cuda_bundle, "cpu")


def test_inspect_of_graphs_for_cuda_names_what_runs_them(cuda_bundle: Path) -> None:
    text = CliRunner().invoke(main, ["inspect", str(cuda_bundle)]).output
    fp32 = Bundle.open(cuda_bundle).manifest.precision == "fp32"
    assert ("ONNX Runtime, CUDA or CPU" in text) == fp32
    assert "ONNX Runtime, CUDA" in text
