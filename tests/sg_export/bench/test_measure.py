"""Timing of complete runs: what is timed and reported. No time is checked against a limit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sg_export.bench.measure import Percentiles, bench
from sg_export.bench.torch_loop import TorchLoop
from sg_export.loading import load_model
from sg_export.parity import two_pass
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import of_classes
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.guidance import levels
from sg_runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow


def test_percentiles_of_times_are_milliseconds() -> None:
    found = Percentiles.of([0.001 * value for value in range(101)])
    assert (found.p50, found.p90, found.p99) == pytest.approx((50, 90, 99))


def test_bench_of_a_bundle_times_it_and_the_baseline_in_turn(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sample, loop = Pipeline.sample, TorchLoop.__call__

    def sampled(self: Pipeline, classes: Sequence[int], *arguments: Any, **options: Any) -> Any:
        order.append(f"ours, {len(classes)} images in {options['steps']} steps")
        return sample(self, classes, *arguments, **options)

    def looped(self: TorchLoop) -> float:
        order.append("pytorch")
        return loop(self)

    monkeypatch.setattr(Pipeline, "sample", sampled)
    monkeypatch.setattr(TorchLoop, "__call__", looped)
    result = bench(tiny_bundle, images=3, steps=4, runs=2, baselines=["pytorch"])
    # A warm-up of the pipeline, then one uncounted round and two counted ones.
    assert order == ["ours, 3 images in 4 steps", *["ours, 3 images in 4 steps", "pytorch"] * 3]
    assert (result.backend, result.device, result.images, result.steps, result.runs) == (
        "onnxruntime-cpu",
        "cpu",
        3,
        4,
        2,
    )
    ours, pytorch = result.sides
    assert (ours.name, ours.precision, ours.ratio) == ("onnxruntime-cpu", "fp32", 1.0)
    assert (pytorch.name, pytorch.precision, pytorch.peak_bytes) == ("pytorch", "fp32", None)
    for side in result.sides:
        for times in (side.step, side.image):
            assert 0 < times.p50 <= times.p90 <= times.p99
        assert side.images_per_second == pytest.approx(1e3 / side.image.p50)  # the median of two is their mean
    assert pytorch.step.p50 == pytest.approx(pytorch.image.p50 * 3 / 4)  # run time / number of evaluations
    assert ours.peak_bytes is not None
    assert ours.peak_bytes > Bundle.open(tiny_bundle).manifest.files["graphs/weights.bin"].size
    assert result.roofline is not None
    assert result.roofline.share > 0
    assert any("CUDAExecutionProvider" in reason for reason in result.rejected)


def test_bench_of_a_fixed_batch_takes_it(tiny_cfg_bundle: Path) -> None:
    result = bench(tiny_cfg_bundle, steps=1, runs=1)
    assert result.images == 3
    assert [side.name for side in result.sides] == ["onnxruntime-cpu"]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"steps": 0}, {"runs": 0}])
def test_bench_of_counts_below_one_is_refused(tiny_bundle: Path, wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"{name}: expected at least 1, found 0"):
        bench(tiny_bundle, **wrong)  # type: ignore[arg-type]


def test_bench_of_a_baseline_without_its_checkpoint_names_the_option(tiny_bundle: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the checkpoint of"):
        bench(tiny_bundle, steps=1, runs=1, baselines=["pytorch"], checkpoint=tiny_bundle / "none.pt")


@pytest.mark.parametrize(
    "bundle", ["tiny_bundle", "tiny_edm_bundle", "tiny_cfg_bundle", "tiny_cosine_bundle", "tiny_autoguidance_bundle"]
)
def test_torch_loop_of_any_guidance_samples_what_the_reference_does(
    bundle: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would be the baseline of another computation."""
    opened = Bundle.open(request.getfixturevalue(bundle))
    manifest, folder = opened.manifest, opened.path.parent
    checkpoint = folder / manifest.source.file
    weak = None if manifest.weak_source is None else folder / manifest.weak_source.file
    conditions = of_classes(manifest.model.labels, [1, 4, 2])
    loop = TorchLoop(opened, checkpoint, weak, conditions, 3, compiled=False, device="cpu")
    states: list[torch.Tensor] = []
    predict = TorchLoop._predict

    def noted(self: TorchLoop, branch: int, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        states.append(x)
        return predict(self, branch, x, *rest)

    monkeypatch.setattr(TorchLoop, "_predict", noted)
    assert loop() > 0
    wanted: list[np.ndarray] = []

    def integrated(run: Any, advance: Any, x: Any, noise: Any) -> Any:
        start = x
        for index, update in enumerate(run):
            start = x if update.evaluation == 0 else start
            wanted.append(x)
            x = advance(index, x, start)
        return x

    monkeypatch.setattr(two_pass, "integrate", integrated)
    two_pass.sample(
        load_model(checkpoint),
        manifest.guidance,
        conditions,
        [0, 1, 2],
        3,
        manifest.sampling.sampler,
        weak=None if weak is None else load_model(weak),
        levels=levels(manifest),
        weak_levels=levels(manifest, manifest.guidance.row.weak_network),
    )
    seen = [state.numpy() for number, state in enumerate(states) if number == 0 or state is not states[number - 1]]
    assert len(seen) == len(wanted)
    for found, expected in zip(seen, wanted, strict=True):
        # The network is the same; only the update sums in another order.
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
