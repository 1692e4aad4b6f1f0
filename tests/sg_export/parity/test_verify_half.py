"""Parity of half-precision bundles, which do not overflow at any time in their range."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from numpy.typing import NDArray

from sg_export.compiler import compile
from sg_export.graph.emulate import emulated
from sg_export.graph.overflow import first_overflow
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_export.options.types import BASES
from sg_export.parity.verify import verify
from sg_runtime.backends.ort import open_session
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import HalfPrecision, Prediction
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.kept import restore, rows
from sg_runtime.sampling import precondition

HALVES: list[HalfPrecision] = ["fp16", "bf16"]


@pytest.fixture(scope="module", params=HALVES)
def half_bundle(request: pytest.FixtureRequest, build_once: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """The tiny model with graphs and engines in half precision, next to its checkpoint."""
    options = {"sparsity": (0.5,), "precision": request.param, "engines": EngineOptions(keep_onnx=True)}
    return build_once(f"tiny-{request.param}-bundle", tiny_checkpoint, **options)


def test_verify_of_half_precision_passes_within_its_gates_alone(half_bundle: Path) -> None:
    parity = verify(half_bundle, times=(0.02, 0.5, 0.98))
    assert parity.passed
    precision = Bundle.open(half_bundle).manifest.precision
    for comparison in parity.comparisons:
        assert comparison.gate == BASES[precision].gates.graph == BASES[precision].gates.run
        assert comparison.overflow is None
    # The compared results are in half precision.
    assert max(comparison.relative_l2 for comparison in parity.comparisons) > BASES["fp32"].gates.graph


def test_verify_saves_commands_for_what_polygraphy_can_run(half_bundle: Path, tmp_path: Path) -> None:
    parity = verify(half_bundle, times=(0.5,), save_polygraphy=tmp_path)
    manifest = Bundle.open(half_bundle).manifest
    onnx_files = [command for command in parity.commands if " --onnxrt " in command]
    assert len(onnx_files) == (len(manifest.graphs) if manifest.precision == "fp16" else 0)
    profiles = sum(len(engine.profiles) for engine in manifest.engines)
    assert len(parity.commands) == len(onnx_files) + profiles
    assert all(command.endswith("--atol 0.02 --rtol 0.02") for command in parity.commands)


def test_pipeline_runs_fp16_on_the_cpu_and_refuses_bf16(half_bundle: Path) -> None:
    if Bundle.open(half_bundle).manifest.precision == "fp16":
        samples = Pipeline.load(half_bundle).sample([0, 1], seeds=[0, 1], steps=3)
        assert np.isfinite(samples).all()
    else:
        with pytest.raises(BundleError, match="its graphs are in BF16, which ONNX Runtime's CPU provider does not run"):
            Pipeline.load(half_bundle, "cpu")


def test_verify_of_an_overflow_names_the_first_operator(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = compile(tiny_checkpoint, CompileOptions(tmp_path / "out", guidance="none", precision="fp16", batch=2)).path
    shutil.copy(tiny_checkpoint, tmp_path)
    path = bundle / "graphs/dense.onnx"
    model = onnx.load(path)
    for initializer in model.graph.initializer:
        if initializer.name == "blocks.1.mlp.fc1.bias":
            large = onnx.numpy_helper.to_array(initializer) + np.float16(6e4)
            initializer.CopyFrom(onnx.numpy_helper.from_array(large, initializer.name))
        elif initializer.name == "blocks.1.mlp.fc2.weight.T":
            ones = np.ones_like(onnx.numpy_helper.to_array(initializer))
            initializer.CopyFrom(onnx.numpy_helper.from_array(ones, initializer.name))
    onnx.save(model, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["graphs/dense.onnx"] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    parity = verify(bundle, times=(0.5,))
    assert not parity.passed
    assert {c.overflow for c in parity.comparisons if c.subject == "dense"} == {"blocks.1.mlp.fc2/MatMul"}


@pytest.mark.parametrize(
    ("prediction", "times"),
    [("flow", np.linspace(0, 1, 41)), ("edm", np.geomspace(0.002, 80, 41))],
    ids=["flow", "edm"],
)
def test_half_precision_is_finite_at_all_times(
    prediction: Prediction, times: NDArray[np.float64], half_bundle: Path
) -> None:
    """A flow model and a denoiser have the same graphs; only the inputs differ."""
    bundle = Bundle.open(half_bundle)
    facts = bundle.manifest.model
    guided = bundle.manifest.graph("guided", 16, 8)
    assert guided is not None
    condition, path = bundle.onnx(bundle.manifest.hoisted("main")[0]), bundle.onnx(guided)
    modulate, step = (open_session(p, emulated(p)) for p in (condition, path))
    generator = np.random.default_rng(0)
    for number, time in enumerate(times):
        scaling = precondition(prediction, float(time))
        x = generator.standard_normal((2, *facts.latent), np.float32)
        x *= np.float32(max(time, 1))
        labels = np.array([0, facts.labels.count])
        (modulations,) = modulate.run(None, {"t": np.full(2, scaling.t, np.float32), "class": labels})
        scalars = {"scale": 4, "c_in": scaling.c_in, "c_skip": scaling.c_skip, "c_out": scaling.c_out}
        inputs = {name: np.array(value, np.float32) for name, value in (scalars | {"a": 1, "b": 1, "e": 0}).items()}
        inputs |= {"x": x, "r": x, "modulations": modulations}
        keep = np.tile(np.arange(8), (2, 1))
        inputs |= {"rows_weak": rows(keep, facts.tokens), "restore_weak": restore(keep, facts.tokens, facts.masked)}
        for found in step.run(None, inputs):
            assert np.isfinite(found).all(), time
        if number % 10 == 0:
            assert first_overflow(path, inputs) is None, time
