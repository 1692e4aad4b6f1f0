"""What complete runs draw, report and refuse. Progress counts are in `test_pipeline`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sg_runtime.run.sample
from sg_runtime import philox
from sg_runtime.bundle import Bundle
from sg_runtime.errors import NonFiniteError
from sg_runtime.manifest import read_manifest
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.budget import run_bytes
from sg_runtime.run.sample import check_finite, noise
from sg_runtime.sampling import Churn

HUGE = 3e38
"""A scale near the end of float32, at which predictions overflow."""


@pytest.mark.parametrize(
    ("bundle", "asked"),
    [
        ("tiny_bundle", {}),
        ("tiny_edm_bundle", {}),
        ("tiny_edm_bundle", {"fused": False}),
        ("tiny_edm_bundle", {"churn": Churn(40)}),
    ],
)
def test_sample_at_a_huge_scale_names_the_images_and_the_next_run_works(
    bundle: str, asked: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(bundle)
    pipe = Pipeline.load(path, "cpu")
    before = pipe.sample([0, 1, 2], [0, 1, 2], steps=3)
    with pytest.raises(NonFiniteError) as caught:
        pipe.sample([0, 1, 2], [0, 1, 2], steps=3, scale=HUGE, **asked)
    assert str(caught.value) == (
        f"{path}: onnxruntime-cpu in fp32: expected finite samples, found NaN or infinity in 3 of 3 (images 0, 1, 2); "
        f"lower the scale, or find the cause with sg-export verify"
    )
    assert caught.value.exit_code == 5
    np.testing.assert_array_equal(pipe.sample([0, 1, 2], [0, 1, 2], steps=3), before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_of_one_bad_value_names_its_image(tiny_bundle: Path, value: float) -> None:
    samples = np.zeros((12, 2, 8, 8), np.float32)
    check_finite(samples, Bundle.open(tiny_bundle), "tensorrt")
    samples[7, 1, 3, 3] = value
    with pytest.raises(NonFiniteError, match=r": tensorrt in fp32: .* in 1 of 12 \(images 7\); lower the scale, or"):
        check_finite(samples, Bundle.open(tiny_bundle), "tensorrt")


def test_check_finite_of_many_bad_images_names_the_first(tiny_bundle: Path) -> None:
    samples = np.full((12, 2, 8, 8), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match=r"in 12 of 12 \(images 0, 1, 2, 3, 4, 5, 6, 7, …\); "):
        check_finite(samples, Bundle.open(tiny_bundle), "tensorrt")


def test_check_finite_of_a_half_precision_names_the_others(edited: Callable[[Callable[[Any], object]], Path]) -> None:
    bundle = Bundle.open(edited(lambda content: content.update(precision="fp16")))
    with pytest.raises(NonFiniteError, match=r"in fp16: .*; lower the scale, or build with bf16 or fp32, or find the"):
        check_finite(np.full((1, 2, 8, 8), np.inf, np.float32), bundle, "tensorrt")


def test_sample_with_progress_that_fails_leaves_its_error(tiny_bundle: Path) -> None:
    """Progress is called once per evaluation, in order over both groups, until it fails."""
    seen: list[tuple[int, int]] = []

    def fail(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        Pipeline.load(tiny_bundle, batch=2).sample([0] * 4, range(4), steps=3, progress=fail)
    assert seen == [(1, 6), (2, 6), (3, 6), (4, 6)]


@settings(max_examples=25)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    purpose=st.sampled_from([philox.INITIAL_NOISE, philox.CHURN]),
    step=st.integers(0, 1000),
)
def test_noise_of_seeds_is_that_of_each_alone(seeds: list[int], purpose: int, step: int, tiny_bundle: Path) -> None:
    found = noise(read_manifest(tiny_bundle / "manifest.json"), seeds, purpose, step)
    assert (found.shape, found.dtype) == ((len(seeds), 2, 8, 8), np.float32)
    for row, seed in zip(found, seeds, strict=True):
        np.testing.assert_array_equal(row, philox.normal(seed, purpose, (2, 8, 8), step=step))


@pytest.mark.parametrize(("budget", "chunks"), [(5, [5]), (0, [1] * 5), (2, [2, 2, 1])])
def test_sample_without_a_chunk_holds_what_the_budget_allows(
    budget: int, chunks: list[int], tiny_bundle: Path, record: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is in evaluations of one image; a chunk has at least one.

    Each chunk begins with a run of `condition`.
    """
    recorder = record(tiny_bundle)
    pipe = Pipeline(Bundle.open(tiny_bundle), recorder, 3)
    manifest = pipe.bundle.manifest
    monkeypatch.setattr(sg_runtime.run.sample, "CHUNK_BYTES", run_bytes(manifest, 1, budget, False))
    pipe.sample([0], [0], steps=5, sampler="euler")
    runs = " ".join(recorder.names).split("condition")
    assert [len(run.split()) for run in runs[1:]] == chunks
