"""Sampling from bundles: what a run is made of, that an image depends on nothing beside it, and what is refused."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_export import two_pass
from sg_export.loading import load_model
from sg_runtime import random
from sg_runtime.errors import UsageError
from sg_runtime.images import to_pixels
from sg_runtime.manifest import GuidanceMode, SamplerName
from sg_runtime.pipeline import Pipeline
from sg_runtime.requests import class_index

Array = NDArray[np.float32]
SAMPLERS: tuple[SamplerName, ...] = ("euler", "heun")
CLASSES, SEEDS = [0, 27, 52, 61, 9], [0, 1, 2**64 - 1, 3, 12345]


def distance(found: Array, expected: Array) -> float:
    """Relative L2, in float64."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def five(pipe: Pipeline) -> Array:
    """Five images in one run of the graphs."""
    return pipe.sample(CLASSES, SEEDS, steps=3)


# Runs


@pytest.mark.parametrize("strong", [0.0, 0.25])
@pytest.mark.parametrize("weak", [0.5, 0.75])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_of_every_pair_fused_agrees_with_two_branches(
    pipe: Pipeline, strong: float, weak: float, sampler: SamplerName
) -> None:
    guidance = pipe.guidance(strong_sparsity=strong, sparsity=weak)
    fused, unfused = (
        pipe.sample(CLASSES, SEEDS, steps=4, sampler=sampler, guidance=guidance, fused=f) for f in (True, False)
    )
    # FP32 rounding in another order: about 3e-7 here, where a fault in the shared prefix or the head is above 1e-2.
    assert distance(fused, unfused) < 1e-5
    assert not np.array_equal(fused, unfused), "fused=False ran the guided graph"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("mode", "strong", "weak"), [("sg", 0.25, 0.75), ("sg", 0.0, 0.5), ("cfg", 0.0, None), ("none", 0.5, None)]
)
def test_sample_of_a_mode_agrees_with_pytorch_in_two_passes(
    pipe: Pipeline, mode: GuidanceMode, strong: float, weak: float | None, sampler: SamplerName
) -> None:
    guidance = pipe.guidance(mode, strong_sparsity=strong, sparsity=weak, scale=1.7)
    classes = [0, 27, pipe.bundle.manifest.model.num_classes]
    found = pipe.sample([0, 27, None], SEEDS[:3], steps=4, sampler=sampler, guidance=guidance)
    expected = two_pass.sample(load_model("glyphs"), guidance, classes, SEEDS[:3], 4, sampler)
    # FP32 rounding of another library, which guidance and sampling multiply by up to some tens.
    assert distance(found, expected) < 1e-4


def test_sample_of_a_pair_without_a_guided_graph_runs_its_branches(pipe: Pipeline) -> None:
    """Strong 0.5 with weak 0.75 was not asked for, but the bundle has both graphs."""
    guidance = pipe.guidance(strong_sparsity=0.5, sparsity=0.75)
    assert pipe.bundle.manifest.graph("guided", guidance.strong.keep, guidance.weak.keep) is None
    found = pipe.sample([3], [4], steps=2, guidance=guidance)
    expected = two_pass.sample(load_model("glyphs"), guidance, [3], [4], 2, "euler")
    assert distance(found, expected) < 1e-4  # as above


def test_sample_without_guidance_is_not_moved_by_the_scale(pipe: Pipeline) -> None:
    none = pipe.guidance("none")
    a, b = (pipe.sample([3], [4], steps=2, guidance=none, scale=scale) for scale in (0.0, 9.0))
    np.testing.assert_array_equal(a, b)


def test_sample_at_scale_one_is_the_strong_branch(pipe: Pipeline) -> None:
    guided = pipe.sample(CLASSES, SEEDS, steps=3, scale=1)
    # weak + (strong - weak) rounds, once per token and evaluation, on the scale of FP32.
    assert distance(guided, pipe.sample(CLASSES, SEEDS, steps=3, guidance=pipe.guidance("none"))) < 1e-5


def test_sample_without_arguments_takes_those_of_the_bundle(tiny_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_bundle)
    defaults = pipe.bundle.manifest
    explicit = pipe.sample(
        [1],
        [2],
        steps=defaults.sampling.steps,
        sampler=defaults.sampling.sampler,
        scale=defaults.guidance.scale,
        guidance=defaults.guidance,
    )
    np.testing.assert_array_equal(pipe.sample([1], [2]), explicit)


def test_sample_of_a_scale_replaces_that_of_the_guidance(pipe: Pipeline) -> None:
    a = pipe.sample([1], [2], steps=2, guidance=pipe.guidance(sparsity=0.75, scale=1.0), scale=3.0)
    b = pipe.sample([1], [2], steps=2, guidance=pipe.guidance(sparsity=0.75, scale=3.0))
    np.testing.assert_array_equal(a, b)


def test_sample_of_names_is_that_of_indices(pipe: Pipeline) -> None:
    """Text is always a name: "0" is the digit, class 52; the number 0 is the letter A."""
    model = pipe.bundle.manifest.model
    assert [class_index(model, name) for name in ("A", 0, "0", "9", None)] == [0, 0, 52, 61, 62]
    named, indexed = (pipe.sample(classes, [5, 6], steps=2) for classes in (["0", "A"], [52, 0]))
    np.testing.assert_array_equal(named, indexed)


def test_sample_of_numpy_numbers_is_that_of_pythons(pipe: Pipeline, five: Array) -> None:
    found = pipe.sample(np.array(CLASSES), np.array(SEEDS, dtype=np.uint64), steps=np.int32(3))
    np.testing.assert_array_equal(found, five)
    found = pipe.sample([np.int16(c) for c in CLASSES], [np.uint64(s) for s in SEEDS], steps=3)
    np.testing.assert_array_equal(found, five)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 3), ("heun", 5)])
@pytest.mark.parametrize(("images", "groups"), [(1, 1), (5, 1), (6, 2)])
def test_sample_with_progress_counts_every_evaluation(
    pipe: Pipeline, sampler: SamplerName, calls: int, images: int, groups: int
) -> None:
    seen: list[tuple[int, int]] = []
    pipe.sample(
        [1] * images, range(images), steps=3, sampler=sampler, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, calls * groups) for done in range(1, calls * groups + 1)]


def test_initial_noise_of_seeds_is_that_of_each_alone(pipe: Pipeline) -> None:
    noise = pipe.initial_noise(SEEDS)
    assert noise.dtype == np.float32
    for row, seed in zip(noise, SEEDS, strict=True):
        np.testing.assert_array_equal(row, random.normal(seed, random.INITIAL_NOISE, (1, 16, 16)))


# Images and latents


def test_call_of_a_pixel_model_returns_pixels(pipe: Pipeline, five: Array) -> None:
    images = pipe(CLASSES, SEEDS, steps=3)
    assert images.shape == (5, 16, 16, 1)
    np.testing.assert_array_equal(images, to_pixels(five))
    np.testing.assert_array_equal(pipe.decode(five), images)


def test_call_with_a_decoder_returns_what_it_makes(pipe: Pipeline, five: Array) -> None:
    np.testing.assert_array_equal(pipe(CLASSES, SEEDS, steps=3, decode=lambda x: x[:, 0] * 2), five[:, 0] * 2)


def test_call_of_a_latent_model_returns_latents(fixed_bundle: Path) -> None:
    pipe = Pipeline.load(fixed_bundle)
    latents = pipe([0, 1], [0, 1], steps=2)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, pipe.sample([0, 1], [0, 1], steps=2))
    assert pipe([0, 1], [0, 1], steps=2, decode=np.shape) == latents.shape


def test_decode_of_latents_is_refused_with_the_remedy(fixed_bundle: Path) -> None:
    pipe = Pipeline.load(fixed_bundle)
    with pytest.raises(UsageError, match="no decoder is in the bundle: pass decode=, or keep the latents") as caught:
        pipe.decode(pipe.initial_noise([0]))
    assert str(caught.value).startswith(str(fixed_bundle))


# An image does not depend on the batch it was made in

images = st.tuples(st.integers(0, 61) | st.none(), st.integers(0, 2**64 - 1))


@settings(deadline=None, max_examples=15)
@given(st.lists(images, min_size=4, max_size=4), st.integers(0, 4))
def test_sample_of_an_image_in_any_company_is_the_same_bits(
    pipe: Pipeline, five: Array, company: list[tuple[int | None, int]], place: int
) -> None:
    """At one batch size of the graph: the other images, and the place among them, leave no trace."""
    company.insert(place, (CLASSES[0], SEEDS[0]))
    classes, seeds = zip(*company, strict=True)
    np.testing.assert_array_equal(pipe.sample(classes, seeds, steps=3)[place], five[0])


@pytest.mark.parametrize("mode", ["none", "cfg", "sg"])
def test_sample_in_another_order_is_the_same_bits(pipe: Pipeline, mode: GuidanceMode) -> None:
    order = [3, 0, 4, 2, 1]
    guidance = pipe.guidance(mode, strong_sparsity=0.25)
    straight = pipe.sample(CLASSES, SEEDS, steps=2, sampler="heun", guidance=guidance)
    shuffled = pipe.sample(
        [CLASSES[k] for k in order], [SEEDS[k] for k in order], steps=2, sampler="heun", guidance=guidance
    )
    np.testing.assert_array_equal(shuffled, straight[order])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sample_in_smaller_batches_agrees(glyphs_bundle: Path, five: Array, batch: int) -> None:
    """Five images by twos are three runs, the last filled up."""
    found = Pipeline.load(glyphs_bundle, batch=batch).sample(CLASSES, SEEDS, steps=3)
    assert found.shape == five.shape
    # Matrix products of another height may sum in another order: FP32 rounding, as with the fused graph.
    assert distance(found, five) < 1e-5


def test_sample_by_graphs_of_a_fixed_batch_is_the_same_bits_for_any_count(fixed_bundle: Path) -> None:
    pipe = Pipeline.load(fixed_bundle)
    classes, seeds = [0, 1, 2, 3, 4, None, 0], range(7)
    seven = pipe.sample(classes, seeds, steps=3)
    for count in range(1, 7):
        np.testing.assert_array_equal(pipe.sample(classes[:count], seeds[:count], steps=3), seven[:count])


@pytest.mark.parametrize("threads", [2, 8])
def test_sample_from_several_threads_is_that_of_one(glyphs_bundle: Path, threads: int) -> None:
    """A fresh pipeline, so that the threads also meet where the graphs are opened."""

    def run(pipe: Pipeline, k: int) -> Array:
        guidance = pipe.guidance(("none", "cfg", "sg")[k % 3])
        return pipe.sample([k, k + 1], [k, 0], steps=2, sampler=SAMPLERS[k % 2], guidance=guidance)

    shared = Pipeline.load(glyphs_bundle)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda k: run(shared, k), range(2 * threads)))
    serial = Pipeline.load(glyphs_bundle)
    for k, result in enumerate(found):
        np.testing.assert_array_equal(result, run(serial, k))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [62]}, "class 62: expected 0 to 61"),
        ({"classes": [-1]}, "class -1: expected 0 to 61"),
        ({"classes": ["ß"]}, "class 'ß': expected one of the model's class names, found none such; it has A, B, C"),
        ({"classes": ["62"]}, "class '62': expected one of the model's class names"),
        ({"classes": [1.0]}, r"class: expected a whole number, found 1\.0"),
        ({"classes": [b"A"]}, "class: expected a whole number, found b'A'"),
        ({"classes": [], "seeds": []}, "classes: expected at least one, found none"),
        ({"seeds": [0, 1]}, "seeds: expected one per class, 1, found 2"),
        ({"seeds": []}, "seeds: expected one per class, 1, found 0"),
        ({"seeds": [-1]}, r"seed -1: expected 0 to 2\*\*64 - 1"),
        ({"seeds": [2**64]}, r"seed 18446744073709551616: expected 0 to 2\*\*64 - 1"),
        ({"seeds": [0.5]}, r"seed: expected a whole number, found 0\.5"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"steps": -3}, "steps: expected at least 1, found -3"),
        ({"steps": 2.5}, r"steps: expected a whole number, found 2\.5"),
        ({"sampler": "ddim"}, "sampler: expected one of euler, heun, found 'ddim'"),
        ({"scale": float("nan")}, "scale: expected a finite float32 number, found nan"),
        ({"scale": float("-inf")}, "scale: expected a finite float32 number, found -inf"),
    ],
)
def test_sample_of_a_wrong_request_is_refused_before_any_work(
    pipe: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    done: list[int] = []
    with pytest.raises(UsageError, match=message):
        pipe.sample(
            **{"classes": [0], "seeds": [0], "steps": 1, **arguments}, progress=lambda now, total: done.append(now)
        )
    assert not done


def test_guidance_of_a_sparsity_not_built_names_the_build(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"build it with: sg-export build glyphs --sparsity 0\.9"):
        pipe.guidance(sparsity=0.9)


def test_sample_of_names_where_there_are_none_says_so(fixed_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"class 'A': .* it has no class names"):
        Pipeline.load(fixed_bundle).sample(["A"], [0])


def test_sample_of_a_branch_without_a_graph_names_the_build(
    edited: Callable[[Callable[[Any], object]], Path],
) -> None:
    def drop_the_weak_graph(content: Any) -> None:
        content["graphs"] = [g for g in content["graphs"] if g["file"] != "graphs/sparse-8.onnx"]

    pipe = Pipeline.load(edited(drop_the_weak_graph))
    assert pipe.sample([0], [0], steps=1).shape == (1, 2, 8, 8)
    with pytest.raises(UsageError) as caught:
        pipe.sample([0], [0], steps=1, fused=False)
    assert str(caught.value) == (
        "sparsity 0.5 has no graph of its own in this bundle; "
        "build it with: sg-export build tiny.safetensors --sparsity 0.5"
    )


@pytest.mark.parametrize("batch", [0, -1])
def test_load_of_a_batch_below_one_is_refused(glyphs_bundle: Path, batch: int) -> None:
    with pytest.raises(UsageError, match=f"batch: expected at least 1, found {batch}"):
        Pipeline.load(glyphs_bundle, batch=batch)


def test_load_of_graphs_of_a_fixed_batch_takes_no_other(fixed_bundle: Path) -> None:
    assert Pipeline.load(fixed_bundle, batch=3).batch == Pipeline.load(fixed_bundle).batch == 3
    with pytest.raises(UsageError, match="fixed to 3 images, found 2"):
        Pipeline.load(fixed_bundle, batch=2)


def test_load_of_a_device_that_is_none_is_refused(glyphs_bundle: Path) -> None:
    with pytest.raises(UsageError, match="device 'cuda:0': expected auto or cpu"):
        Pipeline.load(glyphs_bundle, "cuda:0")


def test_load_of_an_edm_model_is_refused(edited: Callable[[Callable[[Any], object]], Path]) -> None:
    bundle = edited(lambda content: content["model"].update(prediction="edm"))
    with pytest.raises(UsageError, match="edm prediction cannot be sampled by this version"):
        Pipeline.load(bundle)


def test_load_without_hashes_runs_the_same(glyphs_bundle: Path, five: Array) -> None:
    pipe = Pipeline.load(str(glyphs_bundle), "cpu", batch=5, verify_hashes=False)
    np.testing.assert_array_equal(pipe.sample(CLASSES, SEEDS, steps=3), five)
