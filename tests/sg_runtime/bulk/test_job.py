"""Plans of jobs: which image has which class, prompt, seed and shard."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_runtime.bulk.job import Job, Request, plan, usual_shard
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.guidance import PlanChanges
from sg_runtime.manifest import GuidancePlan, Level

Make = Callable[..., Request]

DENSE = GuidancePlan("none", Level(0.0, 16), Level(0.0, 16), 1.0)

JOB = Job(
    schema_version=1,
    bundle="0" * 64,
    size=(8, 8),
    shape=(8, 8, 3),
    count=10,
    seed=0,
    classes=(0, 1, 2),
    prompts=None,
    negative=None,
    guidance=DENSE,
    steps=2,
    sampler="euler",
    churn=None,
    format="png",
    shard=4,
    batch=3,
    backend="onnxruntime-cpu",
    threads=1,
)


def planned(request: Request) -> Job:
    pipe, bundle = request.load()
    return plan(request, pipe, bundle)


@given(st.integers(1, 5000), st.integers(1, 700))
def test_shards_hold_every_image_once_in_order(count: int, shard: int) -> None:
    job = replace(JOB, count=count, shard=shard)
    assert [image for number in range(job.shards) for image in job.images(number)] == list(range(count))


@given(st.integers(1, 400), st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True))
def test_classes_of_a_job_are_balanced(count: int, classes: list[int]) -> None:
    job = replace(JOB, count=count, classes=tuple(classes))
    shares = Counter(dict.fromkeys(classes, 0))
    shares.update(job.condition(image) for image in range(count))  # type: ignore[arg-type]
    assert max(shares.values()) - min(shares.values()) <= 1


def test_seeds_of_a_job_increase_by_one_and_go_on_with_the_first() -> None:
    job = replace(JOB, seed=2**64 - 2)
    assert [job.seed_of(image) for image in range(4)] == [2**64 - 2, 2**64 - 1, 0, 1]


@pytest.mark.parametrize(("count", "name"), [(10, "000007"), (1_000_000, "000007"), (1_000_001, "0000007")])
def test_names_of_images_sort_as_their_numbers(count: int, name: str) -> None:
    assert replace(JOB, count=count).name(7) == name


@pytest.mark.parametrize(
    ("shape", "batch", "shard"),
    [
        ((16, 16, 1), 16, 512),
        ((16, 16, 1), 3, 510),
        ((1024, 1024, 3), 16, 80),  # of at most 85, that are 256 MiB of pixels
        ((1024, 1024, 3), 100, 100),
    ],
)
def test_usual_shard_is_a_multiple_of_the_batch(shape: tuple[int, int, int], batch: int, shard: int) -> None:
    assert usual_shard(shape, batch) == shard


def test_plan_without_options_takes_those_of_the_bundle(request_of: Make) -> None:
    job = planned(request_of(steps=None, shard=None, batch=None))
    assert (job.classes, job.prompts, job.steps, job.batch, job.shard) == ((0, 1, 2, 3, 4), None, 40, 16, 512)
    assert (job.size, job.shape, job.backend, job.sampler) == ((8, 8), (8, 8, 3), "onnxruntime-cpu", "euler")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count: expected at least 1, found 0"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"shard": 0}, "shard: expected at least 1, found 0"),
        ({"seed": 2**64}, "expected 0 to 2\\*\\*64 - 1"),
        ({"classes": (5,)}, "class 5: expected 0 to 4"),
        ({"prompts": ("a cat",)}, "prompts: expected none: the model is conditioned on classes"),
        ({"negative": ""}, "prompts: expected none: the model is conditioned on classes"),
        ({"format": "jpg"}, "format: expected one of png, webdataset, npz, found 'jpg'"),
        ({"sampler": "ddim"}, "sampler: expected one of euler, heun, found 'ddim'"),
        ({"guidance": PlanChanges(mode="autoguidance")}, "autoguidance: this bundle has no weak checkpoint"),
    ],
    ids=str,
)
def test_plan_of_a_wrong_request_is_refused(changes: dict[str, Any], message: str, request_of: Make) -> None:
    with pytest.raises(UsageError, match=message):
        planned(request_of(**changes))


def test_plan_takes_a_class_that_is_named_twice_once(request_of: Make) -> None:
    assert planned(request_of(classes=(3, 0, 3, 1, 0))).classes == (3, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "prompts: expected some, since the model is conditioned on text"),
        ({"prompts": ("a cat", " ")}, "prompts: expected words, found ' '"),
        ({"negative": " "}, "negative: expected words, found ' '"),
        ({"classes": (1,)}, "classes: expected none: the model is conditioned on text"),
    ],
    ids=str,
)
def test_plan_of_a_wrong_request_for_text_is_refused(
    changes: dict[str, Any], message: str, request_of: Make, full_bundle: Path
) -> None:
    text = {"bundle": full_bundle, "batch": 1, "prompts": ("a cat",)}
    assert planned(request_of(**text)).negative == ""
    with pytest.raises(UsageError, match=message):
        planned(request_of(**{**text, **changes}))


def test_plan_for_latents_without_decoder_is_refused(request_of: Make, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="expected a bundle that gives images, found one that samples latents"):
        planned(request_of(bundle=tiny_bundle))


def test_plan_of_png_with_two_channels_is_refused(request_of: Make, pixel_bundle: Path) -> None:
    with pytest.raises(UsageError, match="format png: a PNG has 1 or 3 channels, found 2"):
        planned(request_of(bundle=pixel_bundle))
    assert planned(request_of(bundle=pixel_bundle, format="npz")).shape == (8, 8, 2)


def test_load_of_another_bundle_than_that_of_the_job_is_refused(request_of: Make) -> None:
    with pytest.raises(BundleError, match=r"expected the bundle that the job began with, of manifest 000000000000…"):
        request_of().continuing(JOB).load()


def test_continuing_keeps_what_is_given() -> None:
    request = Request(Path("bundle"), 10, batch=5)
    found = request.continuing(JOB)
    assert (found.batch, found.shard, found.threads, found.backend) == (5, 4, 1, "onnxruntime-cpu")
    assert request.continuing(None) is request


def test_differences_name_each_field_that_differs() -> None:
    other = replace(JOB, seed=1, classes=tuple(range(60)))
    assert JOB.differences(JOB) == []
    assert JOB.differences(other) == ["seed 1 in place of 0", "other classes"]
