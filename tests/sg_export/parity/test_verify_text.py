"""Parity of bundles of a text model with PyTorch, and their calibration and speed."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from polygraphy.json import load_json
from prx_folders import CONFIG, state_of, write_pipeline

from sg_calibration.feeds import collect, images_of, read_shard
from sg_calibration.settings import FeedSettings
from sg_export.bench.measure import bench
from sg_export.checkpoint import Overrides
from sg_export.cost.step import step_costs
from sg_export.options.engines import EngineOptions
from sg_export.parity.verify import verify
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CalibrationError
from sg_runtime.guidance import built_guidances
from sg_runtime.manifest import Precision, Route
from sg_runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow

OVERRIDES = Overrides(Route(1, 1), size=(128, 192), text_tokens=CONFIG.text_tokens)
TIMES = (0.1, 0.9)


@pytest.fixture(scope="module")
def folder(once: Callable[..., Path]) -> Path:
    return once("latents", lambda path: write_pipeline(path, CONFIG, state_of(CONFIG)))


@pytest.fixture(scope="module")
def build(folder: Path, build_once: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that builds the model for CFG + SG at 0 and 0.5, for two images."""
    usual = {"guidance": "cfg+sg", "sparsity": (0.5,), "overrides": OVERRIDES, "batch": 2}
    return lambda name, **options: build_once(name, folder, **{**usual, **options})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_verify_passes_and_polygraphy_repeats_it(
    build: Callable[..., Path], precision: Precision, folder: Path, tmp_path: Path
) -> None:
    bundle = build(f"latents-{precision}", precision=precision)
    parity = verify(bundle, folder, times=TIMES, save_polygraphy=tmp_path)
    assert parity.passed
    subjects = {comparison.subject for comparison in parity.comparisons}
    assert {"condition", "prompt", "dense", "sparse-12", "guided-24-12-null"} <= subjects
    assert {c.output for c in parity.comparisons if c.subject == "prompt"} == {"text_keys", "text_values", "text_bias"}
    for command in parity.commands:
        if "/prompt.onnx" in command or "/guided" in command:
            words = [str(Path(sys.executable).with_name("polygraphy")), *shlex.split(command)[1:]]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout[-2000:]


def test_verify_of_one_image_in_the_form_for_cuda_passes(build: Callable[..., Path], folder: Path) -> None:
    """With one image all sizes are fixed, and the exporter leaves out reshapes."""
    bundle = build("latents-cuda", onnx_target="onnxruntime-cuda", batch=1)
    assert verify(bundle, folder, times=TIMES).passed


def test_text_of_half_bundles_is_in_their_type(build: Callable[..., Path]) -> None:
    manifest = Bundle.open(build("latents-fp16", precision="fp16")).manifest
    prompt = manifest.graph("prompt")
    guided = manifest.graph("guided", 24, 12, null_weak=True)
    assert prompt is not None
    assert guided is not None
    assert [tensor.dtype for tensor in prompt.outputs] == ["float16", "float16", "float32"]
    given = {tensor.name: tensor.dtype for tensor in guided.inputs}
    for name in ("text_keys", "text_values", "text_keys_weak", "text_values_weak"):
        assert given[name] == "float16"


@pytest.fixture(scope="module")
def wide(once: Callable[..., Path]) -> Path:
    """Return a folder of a network with heads of 32 values, for which there are fused kernels."""
    config = replace(CONFIG, width=64, mlp_width=80)
    return once("latents-64", lambda path: write_pipeline(path, config, state_of(config)))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_engines_of_half_precision_fuse_all_attentions(
    build_once: Callable[..., Path], precision: Precision, wide: Path, tmp_path: Path
) -> None:
    engines = EngineOptions(libraries=("tensorrt_rtx",), compute_capabilities=(89,))
    bundle = build_once(
        f"latents-engines-{precision}",
        wide,
        guidance="cfg+sg",
        sparsity=(0.5,),
        precision=precision,
        engines=engines,
        overrides=OVERRIDES,
    )
    manifest = Bundle.open(bundle).manifest
    assert {engine.kind for engine in manifest.engines} == {"condition", "prompt", "guided"}
    (guided,) = (engine for engine in manifest.engines if engine.kind == "guided")
    assert guided.fused_attention
    parity = verify(bundle, wide, times=TIMES, save_polygraphy=tmp_path)
    assert len(parity.commands) == 3
    (inputs,) = tmp_path.glob("guided*-inputs.json")
    feed = load_json(str(inputs))[0]
    assert str(feed["text_keys"].dtype).removeprefix("torch.") == ("bfloat16" if precision == "bf16" else "float16")
    assert torch.as_tensor(feed["text_keys"]).float().isfinite().all()


def test_cost_of_a_run_has_one_prompt_per_branch(build: Callable[..., Path]) -> None:
    manifest = Bundle.open(build("latents-fp32", precision="fp32")).manifest
    condition, prompt = (graph.cost for graph in manifest.hoisted("main"))
    steps = manifest.sampling.steps
    ours = step_costs(manifest)[-1]
    # Time alone makes the modulations; the weak branch has a prompt of its own.
    assert ours.condition_macs == condition.linear_macs + 2 * prompt.linear_macs / steps
    assert ours.condition_bytes == (condition.weight_bytes + 2 * prompt.weight_bytes) / steps


def test_bench_runs_beside_pytorch(build: Callable[..., Path], folder: Path) -> None:
    result = bench(
        build("latents-fp32", precision="fp32"),
        device="cpu",
        images=2,
        steps=2,
        runs=1,
        baselines=("pytorch",),
        checkpoint=folder,
    )
    assert [side.name for side in result.sides] == ["onnxruntime-cpu", "pytorch"]


# Calibration


def test_collect_stores_prompts_with_the_states(build: Callable[..., Path], tmp_path: Path) -> None:
    pipe = Pipeline.load(build("latents-fp32", precision="fp32"), "cpu", batch=2)
    guidances, settings = built_guidances(pipe.bundle.manifest), FeedSettings(samples=2)
    (path,) = collect(pipe, guidances, settings, tmp_path, "identity", lambda *_: None)
    shard, facts = read_shard(path, pipe.bundle.manifest.model), pipe.bundle.manifest.model
    wanted, seeds = images_of("calibration", facts, 2)
    assert shard.seed.tolist() == seeds
    for weak in (False, True):
        for name, values in wanted.rows(weak=weak).items():
            np.testing.assert_array_equal(shard.conditions.rows(weak=weak)[name], values)
    assert not np.array_equal(images_of("gate", facts, 2)[0].rows(weak=False)["embeddings"], wanted.rows(weak=False))


def arrays(**changes: Any) -> dict[str, Any]:
    """Return a user's shard: two evaluations of three images."""
    usual = {
        "x": np.zeros((2, 3, *CONFIG_LATENT), np.float32),
        "time": np.array([1.0, 0.5]),
        "embeddings": np.zeros((3, CONFIG.text_tokens, CONFIG.context), np.float32),
        "mask": np.ones((3, CONFIG.text_tokens), np.int64),
    }
    return {name: array for name, array in {**usual, **changes}.items() if array is not None}


CONFIG_LATENT = (CONFIG.channels, *CONFIG.image_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": None}, "expected arrays x, time, embeddings, mask, found no mask"),
        ({"label": np.zeros(3, np.int64)}, "found also label"),
        ({"embeddings": np.zeros((3, 2, 5), np.float32)}, r"embeddings: expected float32 of \(3, 3, 5\), found"),
        ({"mask": np.full((3, 3), 2)}, "prompt_mask: expected 1 for a token and 0 for padding"),
        ({"negative_mask": np.ones((3, 3), np.int64)}, "negative_mask: expected none without negative_embeds"),
    ],
)
def test_read_shard_of_prompts_that_do_not_fit_is_refused(
    build: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = Bundle.open(build("latents-fp32", precision="fp32")).manifest.model
    np.savez(tmp_path / "own.npz", **arrays())
    assert read_shard(tmp_path / "own.npz", model).conditions.weak is None
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(CalibrationError, match=message):
        read_shard(tmp_path / "own.npz", model)
