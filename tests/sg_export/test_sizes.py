"""A bundle of several sizes has one set of weights, and samples as bundles of each size do."""

import itertools
import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from prx_folders import CONFIG, PIXEL, state_of, write_pipeline

from sg_calibration.ranges import RangeTable
from sg_calibration.settings import FeedSettings
from sg_export.bench.measure import bench
from sg_export.checkpoint import Overrides
from sg_export.cli import main
from sg_export.compiler import compile
from sg_export.loading import load_model, load_weak
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_export.packing.sizes import choose_sizes
from sg_export.parity.verify import verify
from sg_export.quantize.search import measure_ranges
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.manifest import Labels, Manifest, Route
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.sample import noise

pytestmark = pytest.mark.slow

Once = Callable[[str, Callable[[Path], object]], Path]
Build = Callable[..., Path]

LATENT = replace(CONFIG, depth=1)
"""A network of one block, whose tokens cover 32 × 32 pixels."""

SIZES = ((64, 256), (256, 64), (96, 64))
"""The first two have 16 tokens each, so their graphs have the same kinds and kept tokens."""

PIXELS = ((32, 16), (16, 48))
"""Sizes of a model of pixels that is conditioned on the resolution. A token is 16 × 16 pixels."""

OPTIONS: dict[str, Any] = {"sparsity": (0.5,), "batch": 2}


def overrides(size: tuple[int, int]) -> Overrides:
    return Overrides(Route(0, 0), size=size, text_tokens=3)


def named(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@pytest.fixture(scope="module")
def folder(once: Once) -> Path:
    return once("prx-sizes", lambda path: write_pipeline(path, LATENT, state_of(LATENT)))


@pytest.fixture(scope="module")
def pixels(once: Once) -> Path:
    return once("prx-pixels", lambda path: write_pipeline(path, PIXEL, state_of(PIXEL)))


@pytest.fixture(scope="module")
def bundle(folder: Path, build_once: Build) -> Path:
    options = {"overrides": overrides(SIZES[0]), "sizes": SIZES[1:], **OPTIONS}
    return build_once("prx-sizes-bundle", folder, **options)


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def sample(pipe: Pipeline) -> NDArray[np.float32]:
    model = pipe.bundle.manifest.model
    embeddings = np.random.default_rng(0).standard_normal((2, 3, model.conditions.width)).astype(np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    found: NDArray[np.float32] = pipe.sample(pipe.prompts(embeddings, mask), [3, 4], steps=3)
    return found


# What is built


def test_bundle_holds_the_weights_once(bundle: Path, folder: Path, build_once: Build) -> None:
    """Each further size adds its table of rotations: 16 values a token, and what aligns them."""
    alone = build_once("prx-alone-0", folder, overrides=overrides(SIZES[0]), **OPTIONS)
    files = [Bundle.open(path).manifest.files["graphs/weights.bin"].size for path in (bundle, alone)]
    table = 16 * 16 * 4
    assert files[0] == files[1] + table, "the table of 6 tokens is below 1 kB, so it is in the graphs"
    held = sum(tensor.numel() * 4 for tensor in state_of(LATENT).values())
    assert files[0] < held + 2 * table


def test_models_of_all_sizes_have_the_same_parameters_in_memory(folder: Path) -> None:
    first = load_model(folder, overrides=overrides(SIZES[0]))
    other = first.at(*SIZES[1])
    ours, theirs = (dict(loaded.model.network.named_parameters()) for loaded in (first, other))
    assert [(name, tensor.data_ptr()) for name, tensor in ours.items()] == [
        (name, tensor.data_ptr()) for name, tensor in theirs.items()
    ]
    assert not torch.equal(first.model.network.rope, other.model.network.rope)
    assert other.facts == load_model(folder, overrides=overrides(SIZES[1])).facts


def test_graphs_that_do_not_depend_on_the_size_are_those_of_all(manifest: Manifest) -> None:
    assert [graph.name for graph in manifest.all_graphs] == [
        *("condition", "prompt"),
        *("64x256-dense", "64x256-sparse-8", "64x256-guided-16-8"),
        *("256x64-dense", "256x64-sparse-8", "256x64-guided-16-8"),
        *("96x64-dense", "96x64-sparse-3", "96x64-guided-6-3"),
    ]
    for view, (height, width) in zip(manifest.views, SIZES, strict=True):
        assert [graph.name for graph in view.graphs[:2]] == ["condition", "prompt"]
        assert {graph.name.partition("-")[0] for graph in view.graphs[2:]} == {f"{height}x{width}"}


def test_condition_on_the_resolution_is_a_graph_of_each_size(pixels: Path, tmp_path: Path) -> None:
    loaded = load_model(pixels, overrides=overrides(PIXELS[0]))
    builds = choose_sizes(loaded, None, CompileOptions(tmp_path / "out", sizes=PIXELS[1:], **OPTIONS))
    hoisted = [[spec.name for spec in build.specs if spec.hoisted] for build in builds]
    assert hoisted == [["32x16-condition", "prompt"], ["16x48-condition"]]


def test_weights_of_a_bundle_of_one_size_name_no_size(folder: Path, build_once: Build) -> None:
    alone = Bundle.open(build_once("prx-alone-0", folder, overrides=overrides(SIZES[0]), **OPTIONS))
    assert {graph.name for graph in alone.manifest.graphs} == {
        *("condition", "prompt", "dense", "sparse-8", "guided-16-8"),
    }
    assert alone.manifest.sizes == ()
    assert b"rope.64x256" not in alone.file("graphs/dense.onnx").read_bytes()


def test_weak_network_has_graphs_of_each_size(folder: Path, tmp_path: Path) -> None:
    weak = write_pipeline(tmp_path / "weak", LATENT, state_of(LATENT, seed=1))
    strong = load_model(folder, overrides=overrides(SIZES[0]))
    other = load_weak(weak, strong, None, overrides(SIZES[0]))
    options = CompileOptions(tmp_path / "out", (0.5,), weak_checkpoint=weak, sizes=SIZES[2:])
    first, second = choose_sizes(strong, other, options)
    assert [spec.name for spec in second.specs] == ["96x64-dense", "96x64-weak-sparse-3"]
    assert [spec.name for spec in first.specs if spec.hoisted] == [
        *("condition", "prompt", "weak-condition", "weak-prompt"),
    ]
    source = second.source(second.specs[1])
    assert source is second.weak
    assert source.facts.size == SIZES[2]
    assert source.source == other.source


# Ranges


def test_ranges_cover_all_sizes(
    bundle: Path, folder: Path, build_once: Build, caplog: pytest.LogCaptureFixture
) -> None:
    def measured(path: Path) -> RangeTable:
        return measure_ranges(Bundle.open(path), FeedSettings(samples=1), None, None, lambda *_: None)

    found = measured(bundle)
    assert caplog.text.count("calibration on random prompts") == 1
    alone = [
        measured(build_once(f"prx-alone-{number}", folder, overrides=overrides(size), **OPTIONS))
        for number, size in enumerate(SIZES)
    ]
    assert (found.images, found.evaluations) == (3, sum(table.evaluations for table in alone))
    for name, layer in found.layers.items():
        assert layer.largest == tuple(map(max, *(table.layers[name].largest for table in alone)))
    assert found.ranges("min-max") != alone[0].ranges("min-max"), "other sizes reach further"


def test_calibrate_of_several_sizes_makes_a_table_of_all(folder: Path, tmp_path: Path) -> None:
    def calibrate(*words: str | Path) -> Result:
        model = [folder, "--route", "0-0", "--size", "64x256", "--size", "96x64", "--text-tokens", "3"]
        output = ["--quiet", "-o", tmp_path / "ranges.json"]
        return CliRunner().invoke(main, ["calibrate", *map(str, [*model, *words, *output])])

    feeds = tmp_path / "feeds"
    result = calibrate("--calib-samples", "1", "--folder", feeds)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "ranges.json").read_text()
    assert json.loads(table)["images"] == 2
    assert {path.name for path in feeds.iterdir()} == {"64x256", "96x64"}
    assert calibrate("--calib-data", feeds).exit_code == 0
    assert (tmp_path / "ranges.json").read_text() == table
    shutil.rmtree(feeds / "96x64")
    result = calibrate("--calib-data", feeds)
    assert result.exit_code == 6
    assert f"{feeds}/96x64: expected a folder of .npz files, found none" in result.output


# Views


def test_view_describes_its_size(manifest: Manifest) -> None:
    found = [
        (view.model.size, view.model.latent, view.model.tokens, view.guidance.strong.keep, view.guidance.weak.keep)
        for view in manifest.views
    ]
    assert found == [
        ((64, 256), (32, 2, 8), 16, 16, 8),
        ((256, 64), (32, 8, 2), 16, 16, 8),
        ((96, 64), (32, 3, 2), 6, 6, 3),
    ]
    for view in manifest.views:
        assert view.guidance.row is manifest.guidance.row
        assert view.model.parameters == manifest.model.parameters


def test_at_makes_the_views_once(manifest: Manifest) -> None:
    views = manifest.views
    assert all(manifest.at(*size) is view for size, view in zip(SIZES, views, strict=True))
    for other in (pickle.loads(pickle.dumps(manifest)), replace(manifest, created_by="other")):
        assert [view.created_by for view in other.views] == [other.created_by] * len(SIZES)


def test_at_finds_every_size_from_every_view(manifest: Manifest) -> None:
    for view in manifest.views:
        for height, width in SIZES:
            found = view.at(height, width)
            assert found.model == manifest.at(height, width).model
            assert set(found.all_graphs) == set(manifest.all_graphs)
        assert view.at(*SIZES[0]).graphs == manifest.graphs


def test_at_of_a_size_that_was_not_built_names_the_build(manifest: Manifest) -> None:
    with pytest.raises(UsageError) as caught:
        manifest.at(128, 64)
    message, _, command = str(caught.value).partition("; build it with: ")
    assert message == "size 128x64 is not in this bundle, which has 64x256, 256x64, 96x64"
    words = shlex.split(command)
    assert words[:3] == ["sg-export", "build", "prx-sizes"]
    sizes = [value for option, value in itertools.pairwise(words) if option == "--size"]
    assert sizes == ["64x256", "256x64", "96x64", "128x64"]


@pytest.mark.parametrize("size", [(100, 64), (64, 33), (0, 64), (-64, 64)])
def test_at_of_a_size_that_cannot_be_built_names_the_side_of_a_token(size: tuple[int, int], manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=f"^size {named(size)}: expected multiples of 32, the side of a token; the "):
        manifest.at(*size)


def test_at_of_what_is_no_number_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"^width: expected a whole number, found '256'$"):
        manifest.at(64, "256")  # type: ignore[arg-type]


def test_at_of_a_model_of_one_size(tiny_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_bundle, "cpu")
    assert isinstance(pipe.bundle.manifest.model.conditions, Labels)
    assert pipe.at(8, 8).bundle.manifest == pipe.bundle.manifest
    with pytest.raises(UsageError, match=r"^size 16x16: expected 8x8, the size of all samples of this model$"):
        pipe.at(16, 16)


def test_build_command_asks_for_all_sizes(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CompileOptions] = []

    def stop(model: str, options: CompileOptions, report: Any) -> None:
        asked.append(options)
        raise UsageError("far enough")

    monkeypatch.setattr("sg_export.compiler.compile", stop)
    for view in manifest.views:
        CliRunner().invoke(main, shlex.split(build_command(view, "out"))[1:])
    assert [(options.overrides.size, options.sizes) for options in asked] == [
        (SIZES[0], (SIZES[1], SIZES[2])),
        (SIZES[1], (SIZES[0], SIZES[2])),
        (SIZES[2], (SIZES[0], SIZES[1])),
    ], "the size in use comes first"


# Runs


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_sample_at_each_size_is_that_of_a_bundle_of_this_size(
    number: int, bundle: Path, folder: Path, build_once: Build
) -> None:
    size = SIZES[number]
    alone = build_once(f"prx-alone-{number}", folder, overrides=overrides(size), **OPTIONS)
    pipe, single = Pipeline.load(bundle, "cpu"), Pipeline.load(alone, "cpu")
    found = pipe.at(*size)
    samples = sample(found)
    assert samples.shape == (2, 32, size[0] // 32, size[1] // 32)
    np.testing.assert_array_equal(samples, sample(single))
    assert found.backend is pipe.backend


def test_sample_at_another_resolution_is_that_of_a_bundle_of_this_size(pixels: Path, build_once: Build) -> None:
    options: dict[str, Any] = {"guidance": "none", "sparsity": (), "batch": 2}
    both = build_once("prx-pixels-both", pixels, overrides=overrides(PIXELS[0]), sizes=PIXELS[1:], **options)
    alone = build_once("prx-pixels-alone", pixels, overrides=overrides(PIXELS[1]), **options)
    first, second = Bundle.open(both).manifest.views
    assert [graph.name for graph in second.graphs if graph.hoisted] == ["prompt", "16x48-condition"]
    assert [graph.name for graph in first.graphs if graph.hoisted] == ["32x16-condition", "prompt"]
    samples = sample(Pipeline.load(both, "cpu").at(*PIXELS[1]))
    np.testing.assert_array_equal(samples, sample(Pipeline.load(alone, "cpu")))


def test_pipelines_of_all_sizes_run_in_any_order(bundle: Path) -> None:
    pipe = Pipeline.load(bundle, "cpu")
    pipes = {size: pipe.at(*size) for size in SIZES}
    first = {size: sample(own) for size, own in pipes.items()}
    for size in (*SIZES[::-1], *SIZES):
        np.testing.assert_array_equal(sample(pipes[size]), first[size])
        np.testing.assert_array_equal(sample(pipes[SIZES[1]].at(*size)), first[size])
    x = pipes[SIZES[2]].initial_noise([1])
    np.testing.assert_array_equal(x, noise(pipe.bundle.manifest.at(*SIZES[2]), [1], 0))


def test_guidance_of_another_size_is_refused(bundle: Path) -> None:
    """Its numbers of kept tokens are those of that size."""
    pipe = Pipeline.load(bundle, "cpu")
    small = pipe.at(*SIZES[2])
    assert small.guidance(sparsity=0.5).weak.keep == 3
    prompts = small.prompts(np.zeros((1, 3, 5), np.float32))
    with pytest.raises(UsageError) as caught:
        small.sample(prompts, [0], steps=1, guidance=pipe.guidance(scale=3.0))
    assert str(caught.value) == ("guidance: expected a plan for 96x64, found one for 64x256: make it by this pipeline")


def test_pipeline_of_a_size_can_be_pickled(bundle: Path) -> None:
    pipe = Pipeline.load(bundle, "cpu").at(*SIZES[2])
    again = pickle.loads(pickle.dumps(pipe))
    assert again.bundle.manifest == pipe.bundle.manifest
    np.testing.assert_array_equal(sample(again), sample(pipe))


def test_pipeline_of_a_size_outlives_the_working_folder(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(bundle.parent)
    pipe = Pipeline.load(bundle.name, "cpu")
    monkeypatch.chdir(tmp_path)
    assert np.isfinite(sample(pipe.at(*SIZES[1]))).all()


# Commands


def test_verify_compares_every_size(bundle: Path) -> None:
    parity = verify(bundle, times=(0.5,))
    assert parity.passed
    subjects = [comparison.subject for comparison in parity.comparisons]
    assert subjects.count("prompt") == 3, "its three outputs, once"
    graphs = {graph.name for graph in Bundle.open(bundle).manifest.all_graphs}
    assert graphs <= set(subjects)
    runs = [subject.partition(": ")[0] for subject in subjects if subject not in graphs]
    assert {named(size): runs.count(named(size)) for size in SIZES} == dict.fromkeys(map(named, SIZES), len(runs) // 3)


def test_inspect_shows_every_size(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    assert "3×2×32 latents in 6 tokens, patch 1, a picture of 96×64" in result.output
    for size in SIZES:
        assert f"Cost of an evaluation at {named(size)}, per image" in result.output
    content = json.loads(CliRunner().invoke(main, ["inspect", str(bundle), "--json"]).output)
    costs = [costs[-1]["linear_macs"] for costs in content["step_costs_by_size"].values()]
    assert costs[0] == costs[1] > costs[2]


def test_bench_times_the_size_that_is_asked_for(bundle: Path) -> None:
    result = bench(bundle, device="cpu", size=SIZES[2], runs=1, steps=1)
    assert result.sides[0].step.p50 > 0
    refused = CliRunner().invoke(main, ["bench", str(bundle), "--size", "32x32"])
    assert refused.exit_code == 2
    assert "size 32x32 is not in this bundle, which has 64x256, 256x64, 96x64; build it with: " in refused.output


# Refused


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((96, 64), (64, 256)), "size 64x256: expected different sizes, found it twice: leave out one"),
        (((96, 64), (96, 64)), "size 96x64: expected different sizes, found it twice: leave out one"),
        (((96, 60),), "size 96x60: expected multiples of 32 pixels, the side of a token: give `size` 96x32, 96x64"),
        (((32, 32),), "sparsity 0.5 keeps all 1 tokens: use 0, or a higher sparsity"),
    ],
)
def test_compile_of_sizes_that_do_not_fit_is_refused(
    sizes: tuple[tuple[int, int], ...], message: str, folder: Path, tmp_path: Path
) -> None:
    options = CompileOptions(tmp_path / "out", overrides=overrides(SIZES[0]), sizes=sizes, **OPTIONS)
    with pytest.raises(UsageError) as caught:
        compile(folder, options)
    assert str(caught.value).endswith(message)
    assert not (tmp_path / "out").exists()


def test_compile_of_sizes_of_a_class_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected no `size` for a model of tread, whose tensors fix it$"):
        compile(tiny_checkpoint, CompileOptions(tmp_path / "out", (0.5,), sizes=((16, 16),)))
    words = ["build", str(tiny_checkpoint), "--size", "8x8", "--size", "16x16", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "expected no --size for a model of tread, whose tensors fix it" in result.output


def test_inspect_of_several_sizes_is_refused(folder: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder), "--size", "64x64", "--size", "96x64"])
    assert result.exit_code == 2
    assert "--size: expected one, found 2: only build and calibrate take several" in result.output


def altered(bundle: Path, copy: Path, change: Callable[[Any], object]) -> Path:
    copy.mkdir()
    for name in ("graphs", "engines"):
        if (bundle / name).exists():
            (copy / name).symlink_to(bundle / name)
    content = json.loads((bundle / "manifest.json").read_bytes())
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["sizes"][0].update(latent=[32, 2, 8]), "sizes: expected different latents, found"),
        (lambda content: content["sizes"][1].update(tokens=5), "keep: expected at most the model's 5 tokens, found 6"),
        (lambda content: content["sizes"][1].update(latent=[32, 0, 8]), "latent: expected sizes of at least 1"),
        (lambda content: content["sizes"][1].pop("guidance"), "sizes.1.guidance: "),
        (lambda content: content["files"].pop("graphs/96x64-dense.onnx"), "graphs/96x64-dense.onnx is not among"),
    ],
    ids=["same", "tokens", "latent", "guidance", "files"],
)
def test_bundle_with_a_size_that_does_not_fit_is_refused(
    change: Callable[[Any], object], message: str, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(altered(bundle, tmp_path / "copy", change))
    assert message in str(caught.value)


# Engines


def test_engines_are_of_one_size_each(folder: Path, tmp_path: Path) -> None:
    engines = EngineOptions(compute_capabilities=(89,), allow_unfused=True)
    options = CompileOptions(
        tmp_path / "out", (0.5,), precision="fp16", overrides=overrides(SIZES[0]), sizes=SIZES[1:2], engines=engines
    )
    manifest = compile(folder, options).manifest
    first, second = manifest.views
    names = [[Path(engine.file).name.partition(".")[0] for engine in view.engines] for view in (first, second)]
    assert names == [["condition", "prompt", "64x256-guided-16-K"], ["condition", "prompt", "256x64-guided-16-K"]]
    for view, other in ((first, second), (second, first)):
        graph = view.graph("guided", 16, 8)
        assert graph is not None
        found = view.engine(graph, 1)
        assert found is not None
        assert found[0] in view.engines
        assert found[0] not in other.engines
    assert first.engine_batches() == second.engine_batches() == (1,)
