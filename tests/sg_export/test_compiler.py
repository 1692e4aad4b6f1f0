"""From a checkpoint to a bundle, which is written completely or not at all."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sg_calibration.settings import FeedSettings
from sg_export.compiler import compile
from sg_export.loading import LoadedModel, load_model
from sg_export.options.compile import CompileOptions
from sg_export.options.quantize import QuantizeOptions
from sg_export.options.types import BASES
from sg_runtime import __version__
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CheckpointError, ExportError, UsageError
from sg_runtime.manifest import EVEN, FileFacts, GuidancePlan, Karras, Level, Manifest, Route, Sampling
from sg_runtime.pipeline import Pipeline

FULL, MOST, HALF = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def smallest(output: Path, **changes: Any) -> CompileOptions:
    """Return options of the bundle with the fewest graphs, which are also the fastest to trace."""
    return CompileOptions(output, guidance="none", batch=1, **changes)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_compile_writes_the_files_of_the_manifest_alone(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    names = ["condition", "dense", "sparse-12", "sparse-8", "guided-16-8", "guided-12-8"]
    assert [graph.file for graph in manifest.graphs] == [f"graphs/{name}.onnx" for name in names]
    found = content(tiny_bundle)
    assert set(found) == {"manifest.json", "graphs/weights.bin", *(graph.file for graph in manifest.graphs)}
    for name, facts in manifest.files.items():
        assert facts == FileFacts(len(found[name]), hashlib.sha256(found[name]).hexdigest())
    assert set(manifest.files) == set(found) - {"manifest.json"}


def test_compile_states_what_was_decided(tiny_bundle: Path, tiny_checkpoint: Path, loaded: LoadedModel) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.created_by == f"sg-export {__version__}"
    assert manifest.model == loaded.facts
    assert manifest.guidance == GuidancePlan("sg", FULL, HALF, 2.0)
    assert manifest.sampling == Sampling("euler", 40, EVEN)
    assert (manifest.precision, manifest.opset, manifest.batch, manifest.hoisted_rows["condition"]) == (
        "fp32",
        20,
        None,
        40,
    )
    assert manifest.source.file == tiny_checkpoint.name
    assert manifest.source.sha256 == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert (manifest.source.weights, manifest.source.reference) == ("bare", None)
    assert manifest.weak_source is None


def test_compile_stores_kept_tokens_as_integers(tiny_bundle: Path) -> None:
    stored = json.loads((tiny_bundle / "manifest.json").read_bytes())
    levels = [graph["levels"] for graph in stored["graphs"]]
    full, most, half = ({"sparsity": level.sparsity, "keep": level.keep} for level in (FULL, MOST, HALF))
    assert levels == [[], [full], [most], [half], [full, half], [most, half]]
    assert all(isinstance(level["keep"], int) for graph in levels for level in graph)


def test_compile_records_the_parity_of_every_graph(tiny_bundle: Path) -> None:
    for graph in Bundle.open(tiny_bundle).manifest.graphs:
        # Above zero: another program adds in another order. Below: ten times FP32's rounding.
        assert graph.parity is not None
        assert 0 < graph.parity < 1e-5


def test_compile_of_reference_model_names_it(glyphs_bundle: Path) -> None:
    manifest = Bundle.open(glyphs_bundle).manifest
    assert (manifest.source.reference, manifest.source.name) == ("glyphs", "glyphs")
    assert (manifest.model.space, manifest.model.route) == ("pixel", Route(1, 6))
    assert manifest.model.labels.names is not None
    assert "".join(manifest.model.labels.names[:3]) == "ABC"
    assert [graph.file for graph in manifest.graphs if graph.kind == "guided"] == [
        f"graphs/guided-{strong}-{weak}.onnx" for strong in (64, 48) for weak in (32, 16)
    ]


def names(manifest: Manifest) -> list[str]:
    return [graph.name for graph in manifest.graphs]


def test_compile_for_cfg_guides_each_sparsity_by_itself(tiny_cfg_bundle: Path) -> None:
    manifest = Bundle.open(tiny_cfg_bundle).manifest
    assert manifest.guidance == GuidancePlan("cfg", FULL, FULL, 1.5)
    assert names(manifest) == ["condition", "dense", "sparse-12", "guided-16-16-null", "guided-12-12-null"]
    assert [graph.null_weak for graph in manifest.graphs] == [False, False, False, True, True]
    sizes = {t.shape[0] for graph in manifest.graphs[1:] for t in (*graph.inputs, *graph.outputs) if t.shape}
    assert (manifest.batch, sizes) == (3, {3})


def test_compile_for_cfg_and_sg_has_weak_branches_without_class(tiny_cfg_sg_bundle: Path) -> None:
    manifest = Bundle.open(tiny_cfg_sg_bundle).manifest
    assert manifest.guidance == GuidancePlan("cfg+sg", MOST, HALF, 1.5)
    assert names(manifest) == ["condition", "sparse-12", "sparse-8", "guided-12-8-null"]


def test_compile_with_weak_checkpoint_has_two_networks(tiny_autoguidance_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = Bundle.open(tiny_autoguidance_bundle).manifest
    assert manifest.guidance == GuidancePlan("autoguidance", FULL, HALF, 2.0)
    strong, weak = ["condition", "dense"], ["weak-condition", "weak-dense", "weak-sparse-8"]
    assert names(manifest) == [*strong, *weak]
    assert [graph.network for graph in manifest.graphs] == ["main"] * 2 + ["weak"] * 3
    assert manifest.weak_source is not None
    assert (manifest.source.file, manifest.weak_source.file) == ("tiny.safetensors", "tiny-weak.safetensors")
    weak_checkpoint = tiny_checkpoint.with_name("tiny-weak.safetensors")
    assert manifest.weak_source.sha256 == hashlib.sha256(weak_checkpoint.read_bytes()).hexdigest()
    assert all(graph.parity is not None and 0 < graph.parity < 1e-5 for graph in manifest.graphs)


def test_compile_with_weak_checkpoint_writes_a_file_of_weights_for_each(
    tiny_autoguidance_bundle: Path, tiny: Any
) -> None:
    found = content(tiny_autoguidance_bundle)
    assert found.keys() - Bundle.open(tiny_autoguidance_bundle).manifest.files.keys() == {"manifest.json"}
    assert {"graphs/weights.bin", "graphs/weights-weak.bin"} <= found.keys()
    assert len(found["graphs/weights.bin"]) == len(found["graphs/weights-weak.bin"])
    for prefix, seed in (("", 1), ("weak-", 2)):
        tensors = onnx.load(tiny_autoguidance_bundle / f"graphs/{prefix}dense.onnx").graph.initializer
        (stored,) = (onnx.numpy_helper.to_array(t) for t in tensors if t.name == "blocks.1.mlp.fc1.weight.T")
        assert np.array_equal(stored.T, tiny.state(seed)["blocks.1.mlp.fc1.weight"].numpy())


def test_compile_of_an_edm_model_samples_by_heun(tiny_edm_bundle: Path) -> None:
    manifest = Bundle.open(tiny_edm_bundle).manifest
    assert manifest.model.prediction == "edm"
    assert manifest.sampling == Sampling("heun", 40, Karras(0.002, 80.0, 7.0))
    assert manifest.guidance == GuidancePlan("sg", MOST, HALF, 2.0)


def test_compile_with_schedule_states_both_ends(tiny_cosine_bundle: Path) -> None:
    manifest = Bundle.open(tiny_cosine_bundle).manifest
    assert manifest.guidance == GuidancePlan("sg", FULL, HALF, 3.0, MOST, FULL, 1.5, (0.15, 0.9))
    # If the sparsities cross, there is no guided graph: separate graphs run the branches.
    assert names(manifest) == ["condition", "dense", "sparse-12", "sparse-8", "guided-16-8", "guided-12-8"]


def test_compile_reports_every_stage_once(quick_checkpoint: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int | None]] = []
    bundle = compile(quick_checkpoint, smallest(tmp_path / "out"), lambda *stage: stages.append(stage))
    assert stages == [
        (f"loading {quick_checkpoint}", 0, None),
        ("tracing condition, dense", 0, 4),
        ("writing graphs and weights", 1, 4),
        ("checking condition", 2, 4),
        ("checking dense", 3, 4),
    ]
    assert bundle == Bundle.open(tmp_path / "out")
    assert bundle.manifest.guidance == GuidancePlan("none", FULL, FULL, 2.0)
    assert Pipeline.load(bundle.path).sample([0], [0], steps=1).shape == (1, 2, 8, 8)


def test_compile_of_an_untrained_network_succeeds(untrained: Path, tmp_path: Path) -> None:
    bundle = compile(untrained, smallest(tmp_path / "out"))
    assert [graph.parity for graph in bundle.manifest.graphs] == [0.0, 0.0]


@pytest.mark.slow
def test_compile_of_an_untrained_network_to_int8_holds_its_gates(untrained: Path, tmp_path: Path) -> None:
    options = QuantizeOptions("int8", feeds=FeedSettings(1, 25, 0), search_images=1, gate_images=1)
    plan = compile(untrained, CompileOptions(tmp_path / "out", (0.5,), quantize=options)).manifest.quantization
    assert plan is not None
    assert plan.passed
    assert {(q.strong, q.weak, q.guided) for q in plan.quality} == {(1.0, 1.0, 0.0)}


def test_compile_with_force_replaces_the_bundle_behind_a_link(quick_checkpoint: Path, tmp_path: Path) -> None:
    old, link = tmp_path / "old", tmp_path / "link"
    old.mkdir()
    link.symlink_to(old)
    (old / "manifest.json").write_text('{"created_by": "sg-export 0"}')
    (old / "verify.json").write_text("")
    compile(quick_checkpoint, smallest(link, force=True))
    assert link.is_symlink()
    assert sorted(path.name for path in old.iterdir()) == ["graphs", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]


def test_compile_with_force_fills_an_empty_working_folder(
    quick_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert compile(quick_checkpoint, smallest(Path(), force=True)).path == Path()
    assert (tmp_path / "here/manifest.json").is_file()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["bundle", "empty folder", "folder", "another's manifest", "file"])
def test_compile_to_existing_output_says_how(kind: str, force: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        if kind != "empty folder":
            name = "mine" if kind == "folder" else "manifest.json"
            (output / name).write_text('{"created_by": "sg-export 0"}' if kind == "bundle" else '{"name": "mine"}')
    if force and kind in ("bundle", "empty folder"):
        # The check of the output passed: the checkpoint is read next.
        with pytest.raises(CheckpointError, match="found nothing there"):
            compile(tmp_path / "missing.pt", CompileOptions(output, force=True))
        return
    message = "is not a bundle, so `force` does not replace it: give another" if force else "exists: give another"
    with pytest.raises(UsageError, match=message):
        compile(tmp_path / "missing.pt", CompileOptions(output, force=force))
    assert output.is_file() == (kind == "file")


@pytest.mark.parametrize("name", ["checkpoint", "weak checkpoint", "table", "like"])
def test_compile_to_a_bundle_that_holds_an_input_raises(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"created_by": "sg-export 0"}')
    given: dict[str, Any] = {
        "weak checkpoint": {"weak_checkpoint": tmp_path / "old.pt"},
        "table": {"quantize": QuantizeOptions(table=tmp_path / "ranges.json")},
        "like": {"quantize": QuantizeOptions(like=tmp_path)},
    }
    options = CompileOptions(tmp_path, force=True, **given.get(name, {}))
    with pytest.raises(UsageError, match="which this build reads: give another `output`"):
        compile(tmp_path / "new.pt" if name == "checkpoint" else "elsewhere.pt", options)


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/sg-export/out"])
def test_compile_where_nothing_can_be_made_raises(place: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out: cannot be written \(.+\): give another `output`$"):
        compile(tiny_checkpoint, CompileOptions(tmp_path / place))


def test_compile_of_a_checkpoint_it_cannot_read_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        compile(tmp_path / "missing.pt", CompileOptions(tmp_path / "a/b/out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stage", "existing"), [("tracing condition, dense", False), ("checking dense", True)])
def test_compile_that_is_interrupted_leaves_what_was_there(
    stage: str, existing: bool, quick_checkpoint: Path, tmp_path: Path
) -> None:
    def report(at: str, done: int, total: int | None) -> None:
        if at == stage:
            (partial,) = tmp_path.glob(".out.*.partial")
            assert (partial / "graphs/weights.bin").is_file() == existing
            raise KeyboardInterrupt

    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/manifest.json").write_text('{"created_by": "sg-export 0"}')
    with pytest.raises(KeyboardInterrupt):
        compile(quick_checkpoint, smallest(tmp_path / "out", force=existing), report)
    assert content(tmp_path) == ({"out/manifest.json": b'{"created_by": "sg-export 0"}'} if existing else {})


def test_compile_interrupted_while_it_takes_the_place_brings_the_old_bundle_back(
    quick_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"created_by": "sg-export 0"}')
    rename = Path.rename

    def rename_once(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", interrupted)
        return rename(path, target)

    def interrupted(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        compile(quick_checkpoint, smallest(tmp_path / "out", force=True))
    assert content(tmp_path) == {"out/manifest.json": b'{"created_by": "sg-export 0"}'}


def test_compile_to_a_folder_named_by_a_detour_raises(quick_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data").write_text("precious")
    with pytest.raises(UsageError, match="exists: give another `output`"):
        compile(quick_checkpoint, smallest(tmp_path / "mine/absent/.."))
    assert (tmp_path / "mine/data").read_text() == "precious"


def test_compile_to_an_output_that_appears_meanwhile_raises(quick_checkpoint: Path, tmp_path: Path) -> None:
    def report(at: str, done: int, total: int | None) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(UsageError, match="exists: give another `output`"):
        compile(quick_checkpoint, smallest(tmp_path / "out"), report)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_compile_of_a_graph_that_differs_from_pytorch_raises(
    quick_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASES, "fp32", replace(BASES["fp32"], build_limit=0.0))
    with pytest.raises(
        ExportError, match=r"graph condition.onnx: relative L2 distance to PyTorch: expected at most 0, found .*e-0"
    ):
        compile(quick_checkpoint, smallest(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_compile_of_a_network_that_overflows_in_pytorch_blames_the_checkpoint(quick: Any, tmp_path: Path) -> None:
    state = quick.state()
    state["t_embedder.mlp.2.weight"] *= 1e38
    state["final_layer.adaLN_modulation.1.weight"] *= 1e10
    path = quick.save(tmp_path / "huge.safetensors", state)
    told = r"^huge.safetensors: expected finite values .* in PyTorch, found NaN or infinity for condition.onnx: "
    with pytest.raises(CheckpointError, match=told):
        compile(path, smallest(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["huge.safetensors"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"depth": 2},
            "depth: expected 3, found 2; parameters: ",
        ),
        (
            {"width": 64},
            "width: expected 32, found 64; parameters: ",
        ),
        (
            {"num_classes": 7},
            "conditions: expected 5 classes, found 7 classes; parameters: ",
        ),
    ],
)
def test_compile_with_weak_checkpoint_of_another_network_names_what_differs(
    change: dict[str, int], told: str, tiny: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = replace(tiny, config=replace(tiny.config, **change))
    weak = other.save(tmp_path / "other.safetensors")
    with pytest.raises(UsageError) as caught:
        compile(tiny_checkpoint, CompileOptions(tmp_path / "out", weak_checkpoint=weak))
    assert str(caught.value).startswith(
        f"other.safetensors: expected an earlier checkpoint of the network in tiny.safetensors; {told}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_compile_with_missing_weak_checkpoint_makes_no_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing.pt: expected a checkpoint .* found nothing there"):
        compile(tiny_checkpoint, CompileOptions(tmp_path / "out", weak_checkpoint=tmp_path / "missing.pt"))
    assert not list(tmp_path.iterdir())
