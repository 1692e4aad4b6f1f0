"""Sampling from bundles: the parts of a run, independent images, and refused requests."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_export.loading import LoadedModel, load_model
from sg_export.parity import two_pass
from sg_runtime import philox
from sg_runtime.conditions import class_index, of_classes
from sg_runtime.errors import UsageError
from sg_runtime.guidance import levels
from sg_runtime.images import to_pixels
from sg_runtime.manifest import GuidanceMode, Karras, SamplerName
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import Churn, run_times, updates

Array = NDArray[np.float32]
SAMPLERS: tuple[SamplerName, ...] = ("euler", "heun")
CLASSES, SEEDS = [0, 3, 1, 4, 0], [0, 1, 2**64 - 1, 3, 12345]

# Tolerance of FP32 rounding in another order, over a few evaluations of a tiny network: about 3e-7.
# A fault, such as another token or another time, is above 1e-2.
CLOSE = 1e-5
# The same tolerance between PyTorch and ONNX Runtime, multiplied by guidance and the steps of a
# run: about 3e-6.
CLOSE_RUN = 1e-4


def distance(found: Array, expected: Array) -> float:
    """Return the relative L2 distance, computed in float64."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@cache
def checkpoint(path: Path) -> LoadedModel:
    """Return a checkpoint in PyTorch, loaded once."""
    return load_model(path)


@pytest.fixture(scope="module")
def five(pipe: Pipeline) -> Array:
    """Return five images from one run of the graphs."""
    return pipe.sample(CLASSES, SEEDS, steps=3)


# Runs


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("mode", ["sg", "cfg", "cfg+sg"])
@pytest.mark.parametrize("strong", [0.0, 0.25])
def test_sample_fused_agrees_with_two_branches(
    pipe: Pipeline, strong: float, mode: GuidanceMode, sampler: SamplerName
) -> None:
    """Each evaluation is one engine run, or two engine runs that share the update."""
    guidance = pipe.guidance(mode, strong_sparsity=strong)
    fused, unfused = (
        pipe.sample(CLASSES, SEEDS, steps=4, sampler=sampler, guidance=guidance, fused=f) for f in (True, False)
    )
    assert distance(fused, unfused) < CLOSE
    # This bundle has guided graphs only for sg.
    assert np.array_equal(fused, unfused) == (mode != "sg"), "fused=False ran the guided graph"


MODES: list[tuple[str, dict[str, Any]]] = [
    ("tiny_bundle", {"strong_sparsity": 0.25}),
    ("tiny_bundle", {"mode": "none", "strong_sparsity": 0.5}),
    ("tiny_bundle", {"interval": (0.3, 0.8)}),
    ("tiny_bundle", {"strong_sparsity": (0.0, 0.5), "sparsity": (0.5, 0.0), "scale": (3.0, 1.0)}),
    ("tiny_cfg_bundle", {}),
    ("tiny_cfg_bundle", {"strong_sparsity": 0.25}),
    ("tiny_cfg_bundle", {"strong_sparsity": (0.25, 0.0)}),
    ("tiny_cfg_sg_bundle", {}),
    ("tiny_autoguidance_bundle", {}),
    ("tiny_autoguidance_bundle", {"sparsity": (0.5, 0.0)}),
    ("tiny_cosine_bundle", {}),
    ("tiny_edm_bundle", {}),
    ("tiny_edm_bundle", {"mode": "cfg"}),
    ("tiny_edm_bundle", {"interval": (0.3, 20.0), "scale": (1.0, 2.5)}),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("bundle", "chosen"), MODES)
def test_sample_of_any_mode_agrees_with_pytorch_in_two_passes(
    bundle: str, chosen: dict[str, Any], sampler: SamplerName, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(bundle)
    pipe = Pipeline.load(path, batch=3)
    manifest, guidance = pipe.bundle.manifest, pipe.guidance(**chosen)
    weak = None if manifest.weak_source is None else checkpoint(path.parent / manifest.weak_source.file)
    found = pipe.sample([0, 3, None], SEEDS[:3], steps=5, sampler=sampler, guidance=guidance)
    expected = two_pass.sample(
        checkpoint(path.parent / manifest.source.file),
        guidance,
        of_classes(manifest.model.labels, [0, 3, 5]),
        SEEDS[:3],
        5,
        sampler,
        weak=weak,
        levels=levels(manifest),
        weak_levels=levels(manifest, "weak"),
    )
    assert distance(found, expected) < CLOSE_RUN


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("churn", [Churn(40), Churn(2, 0.05, 50, 1.003)])
def test_sample_with_churn_agrees_with_pytorch_in_two_passes(
    tiny_edm_bundle: Path, churn: Churn, sampler: SamplerName
) -> None:
    pipe = Pipeline.load(tiny_edm_bundle)
    manifest = pipe.bundle.manifest
    found = pipe.sample([0, 3, None], SEEDS[:3], steps=5, sampler=sampler, churn=churn)
    loaded = checkpoint(tiny_edm_bundle.parent / manifest.source.file)
    expected = two_pass.sample(
        loaded, manifest.guidance, of_classes(loaded.facts.labels, [0, 3, 5]), SEEDS[:3], 5, sampler, churn=churn
    )
    assert distance(found, expected) < CLOSE_RUN
    assert distance(found, pipe.sample([0, 3, None], SEEDS[:3], steps=5, sampler=sampler)) > 1e-2


def test_sample_of_an_edm_model_starts_from_the_highest_sigma(tiny_edm_bundle: Path) -> None:
    """One Euler step is the prediction itself, at 80 times the noise.

    The defaults are those of the manifest.
    """
    pipe = Pipeline.load(tiny_edm_bundle)
    manifest = pipe.bundle.manifest
    assert manifest.sampling.sampler == "heun"
    assert manifest.sampling.times == Karras(0.002, 80.0, 7.0)
    x = np.float32(80) * pipe.initial_noise([7])
    # x + (0 - 80) (x - D) / 80 in FP32 leaves a rounding of x, about 1e-5, in a D of size 1.
    np.testing.assert_allclose(
        pipe.sample([3], [7], steps=1), pipe.guided(x, pipe.prepare_once(80.0, [3], seeds=[7])), atol=1e-4
    )


def test_sample_of_an_edm_model_feeds_its_noise_levels(record: Callable[[Path], Any], tiny_edm_bundle: Path) -> None:
    """`condition` gets a quarter of their logarithms; step graphs get the scalings."""
    recorder = record(tiny_edm_bundle)
    pipe = Pipeline(Pipeline.load(tiny_edm_bundle).bundle, recorder, 3)
    pipe.sample([0], [0], steps=4, sampler="euler")
    sigmas = np.array(run_times(4, pipe.bundle.manifest.sampling.times)[:-1])
    condition, *steps = recorder.runs
    np.testing.assert_allclose(condition.feeds["t"][:4], np.log(sigmas) / 4, rtol=1e-6)  # rounded to float32
    assert [run.name for run in steps] == ["guided-12-8"] * 4
    np.testing.assert_allclose([run.feeds["c_in"] for run in steps], (sigmas**2 + 0.25) ** -0.5, rtol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("bundle", "runs"),
    [
        ("tiny_bundle", ["guided-16-8"]),
        ("tiny_cfg_bundle", ["guided-16-16-null"]),
        ("tiny_cfg_sg_bundle", ["guided-12-8-null"]),
        ("tiny_autoguidance_bundle", ["dense", "weak-sparse-8"]),
        ("tiny_edm_bundle", ["guided-12-8"]),
    ],
)
def test_sample_of_any_mode_runs_what_an_evaluation_needs_alone(
    bundle: str, runs: list[str], sampler: SamplerName, record: Callable[[Path], Any], request: pytest.FixtureRequest
) -> None:
    """Each network is conditioned in one run before the loop.

    Then each evaluation is one or two engine runs.
    """
    path = request.getfixturevalue(bundle)
    recorder = record(path)
    Pipeline(Pipeline.load(path).bundle, recorder, 3).sample([0, 1, 2], SEEDS[:3], steps=3, sampler=sampler)
    conditions = ["condition", "weak-condition"] if "weak-sparse-8" in runs else ["condition"]
    assert recorder.names == conditions + runs * {"euler": 3, "heun": 5}[sampler]


def test_sample_of_a_schedule_runs_one_branch_outside_of_its_interval(
    record: Callable[[Path], Any], tiny_cosine_bundle: Path
) -> None:
    """Only t = 1 is outside; 0.8, 0.6, 0.4 and 0.2 lie between 0.15 and 0.9."""
    recorder = record(tiny_cosine_bundle)
    Pipeline(Pipeline.load(tiny_cosine_bundle).bundle, recorder, 3).sample([0], [0], steps=5)
    pairs = [["guided-16-8"], ["dense", "sparse-12"], ["sparse-12", "dense"], ["sparse-12", "dense"]]
    assert recorder.names == ["condition", "dense", *(name for pair in pairs for name in pair)]


def test_sample_of_a_schedule_on_one_step_is_at_its_start(record: Callable[[Path], Any], tiny_bundle: Path) -> None:
    recorder = record(tiny_bundle)
    pipe = Pipeline(Pipeline.load(tiny_bundle).bundle, recorder, 3)
    guidance = pipe.guidance(strong_sparsity=(0.0, 0.25), sparsity=(0.5, 0.25), scale=(3.0, 1.0))
    pipe.sample([0], [0], steps=1, guidance=guidance)
    assert recorder.names == ["condition", "guided-16-8"]
    assert recorder.runs[-1].feeds["scale"] == 3


def test_sample_without_guidance_is_not_moved_by_the_scale(pipe: Pipeline) -> None:
    none = pipe.guidance("none")
    a, b = (pipe.sample([3], [4], steps=2, guidance=none, scale=scale) for scale in (0.0, 9.0))
    np.testing.assert_array_equal(a, b)


def test_sample_at_scale_one_is_the_strong_branch(pipe: Pipeline) -> None:
    guided = pipe.sample(CLASSES, SEEDS, steps=3, scale=1)
    # weak + (strong - weak) rounds in FP32, once per token and evaluation.
    assert distance(guided, pipe.sample(CLASSES, SEEDS, steps=3, guidance=pipe.guidance("none"))) < CLOSE


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_edm_bundle", "tiny_cosine_bundle"])
def test_sample_without_arguments_takes_those_of_the_bundle(bundle: str, request: pytest.FixtureRequest) -> None:
    pipe = Pipeline.load(request.getfixturevalue(bundle))
    defaults = pipe.bundle.manifest
    explicit = pipe.sample(
        [1],
        [2],
        steps=defaults.sampling.steps,
        sampler=defaults.sampling.sampler,
        guidance=defaults.guidance,
        churn=None,
    )
    np.testing.assert_array_equal(pipe.sample([1], [2]), explicit)
    assert np.isfinite(explicit).all()


def test_sample_of_a_scale_replaces_that_of_the_guidance(pipe: Pipeline) -> None:
    a = pipe.sample([1], [2], steps=2, guidance=pipe.guidance(sparsity=0.25, scale=(1.0, 2.0)), scale=3.0)
    b = pipe.sample([1], [2], steps=2, guidance=pipe.guidance(sparsity=0.25, scale=3.0))
    np.testing.assert_array_equal(a, b)
    a = pipe.sample([1], [2], steps=2, scale=(3.0, 1.0))
    b = pipe.sample([1], [2], steps=2, guidance=pipe.guidance(scale=(3.0, 1.0)))
    np.testing.assert_array_equal(a, b)


def test_sample_of_names_is_that_of_indices(pipe: Pipeline) -> None:
    """Text is always a name: "0" is the digit (class 3), the number 0 is the letter A."""
    labels = pipe.bundle.manifest.model.labels
    assert [class_index(labels, name) for name in ("A", 0, "0", "9", None)] == [0, 0, 3, 4, 5]
    named, indexed = (pipe.sample(classes, [5, 6], steps=2) for classes in (["0", "A"], [3, 0]))
    np.testing.assert_array_equal(named, indexed)


def test_sample_of_a_name_of_two_classes_names_their_indices(pipe: Pipeline) -> None:
    """ImageNet has two cranes and two maillots. Their indices, and all other names, are clear."""
    labels = replace(pipe.bundle.manifest.model.labels, names=("crane", "b", "c", "d", "crane"))
    message = "class 'crane': expected the name of one class, found it at 0, 4: give the index"
    with pytest.raises(UsageError, match=message):
        class_index(labels, "crane")
    assert [class_index(labels, name) for name in ("b", 4)] == [1, 4]


def test_sample_of_numpy_numbers_is_that_of_pythons(pipe: Pipeline, five: Array) -> None:
    found = pipe.sample(np.array(CLASSES), np.array(SEEDS, dtype=np.uint64), steps=np.int32(3))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, five)
    found = pipe.sample([np.int16(c) for c in CLASSES], [np.uint64(s) for s in SEEDS], steps=3)  # type: ignore[misc]
    np.testing.assert_array_equal(found, five)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 3), ("heun", 5)])
@pytest.mark.parametrize(("images", "groups"), [(1, 1), (5, 1), (6, 2)])
@pytest.mark.parametrize("fused", [True, False])
def test_sample_with_progress_counts_every_evaluation(
    pipe: Pipeline, sampler: SamplerName, calls: int, images: int, groups: int, fused: bool
) -> None:
    seen: list[tuple[int, int]] = []
    pipe.sample(
        [1] * images,
        range(images),
        steps=3,
        sampler=sampler,
        fused=fused,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, calls * groups) for done in range(1, calls * groups + 1)]


def test_initial_noise_of_seeds_is_that_of_each_alone(pipe: Pipeline) -> None:
    noise = pipe.initial_noise(SEEDS)
    assert noise.dtype == np.float32
    for row, seed in zip(noise, SEEDS, strict=True):
        np.testing.assert_array_equal(row, philox.normal(seed, philox.INITIAL_NOISE, (2, 8, 8)))


def test_sample_with_churn_adds_the_documented_noise(record: Callable[[Path], Any], tiny_edm_bundle: Path) -> None:
    """Each image gets its own noise in each step, added to the previous step's result."""
    recorder = record(tiny_edm_bundle)
    pipe = Pipeline(Pipeline.load(tiny_edm_bundle).bundle, recorder, 3)
    churn, seeds = Churn(1.0, high=30.0), [5, 6, 7]
    pipe.sample([0, 1, None], seeds, steps=4, sampler="euler", churn=churn)
    run = updates("euler", "edm", run_times(4, pipe.bundle.manifest.sampling.times), churn)
    assert [update.noise > 0 for update in run] == [False, True, True, True]
    x = np.float32(80) * pipe.initial_noise(seeds)
    for update, done in zip(run, recorder.runs[1:], strict=True):
        noise = np.stack([philox.normal(seed, philox.CHURN, (2, 8, 8), step=update.step) for seed in seeds])
        np.testing.assert_array_equal(done.feeds["x"], x + np.float32(update.noise) * noise)
        x = done.result


# Images and latents


def test_call_of_a_pixel_model_returns_pixels(pipe: Pipeline, five: Array) -> None:
    images = pipe(CLASSES, SEEDS, steps=3)
    assert images.shape == (5, 8, 8, 2)
    np.testing.assert_array_equal(images, to_pixels(five))
    np.testing.assert_array_equal(pipe.decode(five), images)


def test_call_with_a_decoder_returns_what_it_makes(pipe: Pipeline, five: Array) -> None:
    np.testing.assert_array_equal(pipe(CLASSES, SEEDS, steps=3, decode=lambda x: x[:, 0] * 2), five[:, 0] * 2)


def test_call_of_a_latent_model_returns_latents(tiny_cfg_sg_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_cfg_sg_bundle)
    latents = pipe([0, 1], [0, 1], steps=2)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, pipe.sample([0, 1], [0, 1], steps=2))
    np.testing.assert_array_equal(pipe([0, 1], [0, 1], steps=2, decode=lambda x: x[:, 0]), latents[:, 0])


def test_decode_of_latents_is_refused_with_the_remedy(tiny_cfg_sg_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_cfg_sg_bundle)
    with pytest.raises(
        UsageError, match="expected a decoder for the model's latents, found none: pass decode="
    ) as caught:
        pipe.decode(pipe.initial_noise([0]))
    assert str(caught.value).startswith(str(tiny_cfg_sg_bundle))


# An image does not depend on its batch

images = st.tuples(st.integers(0, 4) | st.none(), st.integers(0, 2**64 - 1))


@settings(max_examples=15)
@given(st.lists(images, min_size=4, max_size=4), st.integers(0, 4))
def test_sample_of_an_image_in_any_company_is_the_same_bits(
    pipe: Pipeline, five: Array, company: list[tuple[int | None, int]], place: int
) -> None:
    """At one batch size, neither the other images nor the position among them matters."""
    company.insert(place, (CLASSES[0], SEEDS[0]))
    classes, seeds = zip(*company, strict=True)
    np.testing.assert_array_equal(pipe.sample(classes, seeds, steps=3)[place], five[0])


@pytest.mark.parametrize("mode", ["none", "cfg", "sg", "cfg+sg"])
def test_sample_in_another_order_is_the_same_bits(pipe: Pipeline, mode: GuidanceMode) -> None:
    order = [3, 0, 4, 2, 1]
    guidance = pipe.guidance(mode, strong_sparsity=0.25)
    straight = pipe.sample(CLASSES, SEEDS, steps=2, sampler="heun", guidance=guidance)
    shuffled = pipe.sample(
        [CLASSES[k] for k in order], [SEEDS[k] for k in order], steps=2, sampler="heun", guidance=guidance
    )
    np.testing.assert_array_equal(shuffled, straight[order])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sample_in_smaller_batches_agrees(pixel_bundle: Path, five: Array, batch: int) -> None:
    """Five images in groups of two are three runs. The last group is padded."""
    found = Pipeline.load(pixel_bundle, batch=batch).sample(CLASSES, SEEDS, steps=3)
    assert found.shape == five.shape
    # Matmuls with another number of rows may sum in another order.
    assert distance(found, five) < CLOSE


@pytest.mark.parametrize(
    ("bundle", "churn"),
    [
        ("tiny_cfg_bundle", None),
        ("tiny_cfg_sg_bundle", None),
        ("tiny_autoguidance_bundle", None),
        ("tiny_cosine_bundle", None),
        ("tiny_edm_bundle", None),
        ("tiny_edm_bundle", Churn(40)),
    ],
)
def test_sample_by_graphs_of_a_fixed_batch_is_the_same_bits_for_any_count(
    bundle: str, churn: Churn | None, request: pytest.FixtureRequest
) -> None:
    pipe = Pipeline.load(request.getfixturevalue(bundle))
    classes, seeds = [0, 1, 2, 3, 4, None, 0], range(7)
    seven = pipe.sample(classes, seeds, steps=3, churn=churn)
    for count in range(1, 7):
        np.testing.assert_array_equal(pipe.sample(classes[:count], seeds[:count], steps=3, churn=churn), seven[:count])
    np.testing.assert_array_equal(pipe.sample(classes[5:], seeds[5:], steps=3, churn=churn), seven[5:])


@pytest.mark.parametrize("threads", [2, 8])
def test_sample_from_several_threads_is_that_of_one(pixel_bundle: Path, threads: int) -> None:
    """The pipeline is fresh, so the threads also compete to open the graphs."""

    def run(pipe: Pipeline, k: int) -> Array:
        guidance = pipe.guidance(("none", "cfg", "sg")[k % 3])
        return pipe.sample([k % 5, k % 3], [k, 0], steps=2, sampler=SAMPLERS[k % 2], guidance=guidance)

    shared = Pipeline.load(pixel_bundle)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda k: run(shared, k), range(2 * threads)))
    serial = Pipeline.load(pixel_bundle)
    for k, result in enumerate(found):
        np.testing.assert_array_equal(result, run(serial, k))


# Refused requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [5]}, "class 5: expected 0 to 4"),
        ({"classes": [-1]}, "class -1: expected 0 to 4"),
        (
            {"classes": ["ß"]},
            "class 'ß': expected one of the model's class names, found no match; the model has A, B, C, 0, 9",
        ),
        ({"classes": ["5"]}, "class '5': expected one of the model's class names"),
        ({"classes": [1.0]}, r"class: expected a whole number, found 1\.0"),
        ({"classes": [b"A"]}, "class: expected a whole number, found b'A'"),
        ({"classes": [], "seeds": []}, "classes: expected at least one, found none"),
        ({"seeds": [0, 1]}, "seeds: expected 1, one per image, found 2"),
        ({"seeds": []}, "seeds: expected 1, one per image, found 0"),
        ({"seeds": [-1]}, r"seed -1: expected 0 to 2\*\*64 - 1"),
        ({"seeds": [2**64]}, r"seed 18446744073709551616: expected 0 to 2\*\*64 - 1"),
        ({"seeds": [0.5]}, r"seed: expected a whole number, found 0\.5"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"steps": -3}, "steps: expected at least 1, found -3"),
        ({"steps": 2.5}, r"steps: expected a whole number, found 2\.5"),
        ({"sampler": "ddim"}, "sampler: expected one of euler, heun, found 'ddim'"),
        ({"scale": float("nan")}, "scale: expected a finite float32 number, found nan"),
        ({"scale": float("-inf")}, "scale: expected a finite float32 number, found -inf"),
        ({"scale": (1.0, float("inf"))}, "scale: expected a finite float32 number, found inf"),
        ({"churn": Churn(1.0)}, "churn: expected an edm model, found a model of flow"),
        ({"churn": 1.0}, r"churn: expected a Churn, found 1\.0"),
        ({"classes": 0}, "classes: expected a sequence with a class for each image, found 0"),
        ({"classes": "A"}, "classes: expected a sequence with a class for each image, found 'A'"),
        ({"classes": {"A"}}, "classes: expected a sequence with a class for each image, found {'A'}"),
        ({"classes": [True]}, "class: expected a whole number, found True"),
        ({"seeds": 0}, "seeds: expected a sequence of whole numbers, found 0"),
        ({"seeds": "0"}, "seeds: expected a sequence of whole numbers, found '0'"),
        ({"seeds": ["0"]}, "seed: expected a whole number, found '0'"),
        ({"steps": "4"}, "steps: expected a whole number, found '4'"),
        ({"steps": True}, "steps: expected a whole number, found True"),
        ({"sampler": ""}, "sampler: expected one of euler, heun, found ''"),
        ({"sampler": ["heun"]}, r"sampler: expected one of euler, heun, found \['heun'\]"),
        (
            {"scale": (1.0, 2.0, 3.0)},
            r"scale: expected a number, or two \(of the first and the last step\), found 3",
        ),
        ({"scale": "4"}, "scale: expected a number, or two .* found '4'"),
        ({"scale": ("1", "4")}, "scale: expected a number, found '1'"),
        ({"scale": True}, "scale: expected a number, or two .* found True"),
        ({"guidance": "cfg"}, "guidance: expected a GuidancePlan, which `Pipeline.guidance.*` returns, found 'cfg'"),
        ({"fused": "no"}, "fused: expected True or False, found 'no'"),
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


def test_sample_of_numpy_and_list_arguments_is_that_of_pythons(pipe: Pipeline) -> None:
    expected = pipe.sample([1, 2], [3, 4], steps=2, scale=(3.0, 1.5))
    asked: dict[str, Any] = {"classes": np.array([1, 2], np.int32), "seeds": np.array([3, 4], np.uint64)}
    for scale in ([3.0, 1.5], np.array([3.0, 1.5], np.float32)):
        np.testing.assert_array_equal(pipe.sample(**asked, steps=np.int8(2), scale=scale), expected)
    one = pipe.sample([1, 2], [3, 4], steps=2, scale=3.0)
    np.testing.assert_array_equal(pipe.sample([1, 2], (3, 4), steps=2, scale=np.float32(3)), one)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": (0.5, 0.5, 0.0)}, "^sparsity: expected a number, or two .* found 3 values"),
        ({"strong_sparsity": "0"}, "^strong_sparsity: expected a number, or two .* found '0'"),
        ({"scale": "2"}, "^scale: expected a number, or two"),
        ({"interval": 0.5}, r"^interval: expected the lowest and the highest time, found 0\.5"),
        ({"interval": (0.1, 0.5, 0.9)}, "^interval: expected the lowest and the highest time, found 3 values"),
        ({"interval": "01"}, "^interval: expected the lowest and the highest time, found '01'"),
        ({"interval": (0.9, 0.1)}, "^interval: expected 0 <= lowest time <= highest time"),
        ({"mode": ["sg"]}, r"^guidance: expected one of none, cfg, .* found \['sg'\]"),
    ],
)
def test_guidance_of_a_wrong_request_is_refused(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.guidance(**arguments)


@pytest.mark.parametrize("seeds", [0, "12", [], [0.5], [-1]])
def test_initial_noise_of_wrong_seeds_is_refused(pipe: Pipeline, seeds: Any) -> None:
    with pytest.raises(UsageError, match=r"^seeds?"):
        pipe.initial_noise(seeds)


@pytest.mark.parametrize("x", [[0.0], np.zeros((1, 2, 8, 8), np.uint8), np.zeros((2, 8, 8), np.float32)])
def test_decode_of_no_samples_is_refused(pipe: Pipeline, x: Any) -> None:
    with pytest.raises(UsageError, match=r"^x: expected .*floats of shape \(B, 2, 8, 8\), found "):
        pipe.decode(x)


def test_call_of_a_decoder_that_is_no_function_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"^decode: expected a function, found 'png'"):
        pipe([0], [0], decode="png")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bundle": None}, "^bundle: expected the path of a folder, found None"),
        ({"bundle": 7}, "^bundle: expected the path of a folder, found 7"),
        ({"device": 0}, "^device: expected auto, cpu, cuda, or cuda:NUMBER, found 0"),
        ({"backend": ["onnxruntime-cpu"]}, "^backend: expected one of "),
        ({"batch": "4"}, "^batch: expected a whole number, found '4'"),
        ({"chunk": 1.5}, r"^chunk: expected a whole number, found 1\.5"),
        ({"threads": "all"}, "^threads: expected a whole number, found 'all'"),
        ({"capture": "no"}, "^capture: expected True or False, found 'no'"),
        ({"verify_hashes": 0}, "^verify_hashes: expected True or False, found 0"),
    ],
)
def test_load_of_a_wrong_request_is_refused(pixel_bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.load(**{"bundle": pixel_bundle, **arguments})


def test_churn_of_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^churn: amount: expected a number, found '40'"):
        Churn("40")  # type: ignore[arg-type]


def test_guidance_of_a_sparsity_not_built_names_the_build(pipe: Pipeline) -> None:
    with pytest.raises(
        UsageError,
        match=r"build it with: sg-export build tiny.safetensors .* --sparsity 0\.9",
    ):
        pipe.guidance(sparsity=0.9)


def test_sample_of_names_where_there_are_none_says_so(tiny_cfg_sg_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"class 'A': .* the model has no class names"):
        Pipeline.load(tiny_cfg_sg_bundle).sample(["A"], [0])


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
        "sparsity 0.5 has no single-branch graph in this bundle; "
        "build it with: sg-export build tiny.safetensors --route 1-1 --prediction flow --heads 2 --sparsity 0.5"
    )


@pytest.mark.parametrize("batch", [0, -1])
def test_load_of_a_batch_below_one_is_refused(pixel_bundle: Path, batch: int) -> None:
    with pytest.raises(UsageError, match=f"batch: expected at least 1, found {batch}"):
        Pipeline.load(pixel_bundle, batch=batch)


def test_load_of_graphs_of_a_fixed_batch_takes_no_other(tiny_cfg_sg_bundle: Path) -> None:
    for batch in (3, None):
        assert Pipeline.load(tiny_cfg_sg_bundle, batch=batch).sample([0], [0], steps=1).shape == (1, 2, 8, 8)
    with pytest.raises(UsageError, match="fixed to 3 images, found 2"):
        Pipeline.load(tiny_cfg_sg_bundle, batch=2)


def test_load_of_a_device_that_is_none_is_refused(pixel_bundle: Path) -> None:
    with pytest.raises(UsageError, match="device 'gpu': expected auto, cpu, cuda, or cuda:NUMBER"):
        Pipeline.load(pixel_bundle, "gpu")


def test_guidance_of_another_mode_keeps_the_rest(pipe: Pipeline) -> None:
    plan = pipe.guidance("cfg+sg", strong_sparsity=0.25, scale=(2, 1), interval=(0.2, 0.8))
    assert (plan.mode, plan.strong.sparsity, plan.weak.sparsity) == ("cfg+sg", 0.25, 0.5)
    assert (plan.scale, plan.scale_last, plan.interval) == (2.0, 1.0, (0.2, 0.8))


def test_sample_of_a_plan_for_two_networks_where_there_is_one_names_the_build(
    pipe: Pipeline, tiny_autoguidance_bundle: Path
) -> None:
    other = Pipeline.load(tiny_autoguidance_bundle).guidance()
    with pytest.raises(UsageError, match=r"autoguidance: this bundle has no weak checkpoint; build it with: .* PATH$"):
        pipe.sample([0], [0], steps=1, guidance=other)


def test_load_without_hashes_runs_the_same(pixel_bundle: Path, five: Array) -> None:
    pipe = Pipeline.load(str(pixel_bundle), "cpu", batch=5, verify_hashes=False)
    np.testing.assert_array_equal(pipe.sample(CLASSES, SEEDS, steps=3), five)
