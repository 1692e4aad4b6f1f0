"""From a checkpoint to a bundle, whole or not at all."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import sg_export.compiler
from sg_export.compiler import CompileOptions, check_graph, compile, plan_build
from sg_export.loading import LoadedModel, load_model
from sg_runtime import __version__
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CheckpointError, ExportError, UsageError
from sg_runtime.manifest import FileFacts, GuidancePlan, Level, Route, Sampling
from sg_runtime.pipeline import Pipeline

FULL, MOST, HALF = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def smallest(output: Path, **changes: Any) -> CompileOptions:
    """The bundle with the fewest and the most quickly traced graphs."""
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
    assert manifest.sampling == Sampling("euler", 40)
    assert (manifest.precision, manifest.opset, manifest.batch, manifest.condition_rows) == ("fp32", 20, None, 32)
    assert manifest.source.file == tiny_checkpoint.name
    assert manifest.source.sha256 == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert (manifest.source.weights, manifest.source.reference) == ("bare", None)


def test_compile_stores_kept_tokens_as_integers(tiny_bundle: Path) -> None:
    stored = json.loads((tiny_bundle / "manifest.json").read_bytes())
    levels = [graph["levels"] for graph in stored["graphs"]]
    full, most, half = ({"sparsity": level.sparsity, "keep": level.keep} for level in (FULL, MOST, HALF))
    assert levels == [[], [full], [most], [half], [full, half], [most, half]]
    assert all(isinstance(level["keep"], int) for graph in levels for level in graph)


def test_compile_records_the_parity_of_every_graph(tiny_bundle: Path) -> None:
    for graph in Bundle.open(tiny_bundle).manifest.graphs:
        # Above zero: another program adds in another order. Below: FP32's rounding, ten times over.
        assert graph.parity is not None
        assert 0 < graph.parity < 1e-5


def test_compile_of_reference_model_names_it(glyphs_bundle: Path) -> None:
    manifest = Bundle.open(glyphs_bundle).manifest
    assert (manifest.source.reference, manifest.source.name) == ("glyphs", "glyphs")
    assert (manifest.model.space, manifest.model.route) == ("pixel", Route(1, 6))
    assert manifest.model.class_names is not None
    assert "".join(manifest.model.class_names[:3]) == "ABC"
    assert [graph.file for graph in manifest.graphs if graph.kind == "guided"] == [
        f"graphs/guided-{strong}-{weak}.onnx" for strong in (64, 48) for weak in (32, 16)
    ]


def test_compile_for_cfg_has_the_strong_branch_alone(cfg_bundle: Path) -> None:
    manifest = Bundle.open(cfg_bundle).manifest
    assert manifest.guidance == GuidancePlan("cfg", MOST, MOST, 1.5)
    assert [graph.kind for graph in manifest.graphs] == ["condition", "sparse"]
    assert (manifest.batch, manifest.sampling.steps) == (3, 7)
    sizes = {tensor.shape[0] for graph in manifest.graphs[1:] for tensor in (*graph.inputs, *graph.outputs)}
    assert sizes == {3}


def test_compile_reports_every_stage_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int | None]] = []
    bundle = compile(tiny_checkpoint, smallest(tmp_path / "out"), lambda *stage: stages.append(stage))
    assert stages == [
        (f"loading {tiny_checkpoint}", 0, None),
        ("tracing condition", 0, 5),
        ("tracing dense", 1, 5),
        ("writing graphs and weights", 2, 5),
        ("checking condition", 3, 5),
        ("checking dense", 4, 5),
    ]
    assert bundle == Bundle.open(tmp_path / "out")
    assert bundle.manifest.guidance == GuidancePlan("none", FULL, FULL, 2.0)
    assert Pipeline.load(bundle.path).sample([0], [0], steps=1).shape == (1, 2, 8, 8)


def test_compile_of_an_untrained_network_succeeds(tiny: Any, tmp_path: Path) -> None:
    # Upstream starts adaLN and the head at zero, so that all outputs are zero.
    state = tiny.state()
    for name, tensor in state.items():
        if "adaLN" in name or name.startswith("final_layer"):
            tensor.zero_()
    bundle = compile(tiny.save(tmp_path / "start.safetensors", state), smallest(tmp_path / "out"))
    assert [graph.parity for graph in bundle.manifest.graphs] == [0.0, 0.0]


def test_compile_with_force_replaces_the_bundle_behind_a_link(tiny_checkpoint: Path, tmp_path: Path) -> None:
    old, link = tmp_path / "old", tmp_path / "link"
    old.mkdir()
    link.symlink_to(old)
    (old / "manifest.json").write_text('{"created_by": "sg-export 0"}')
    (old / "more").write_text("")
    compile(tiny_checkpoint, smallest(link, force=True))
    assert link.is_symlink()
    assert sorted(path.name for path in old.iterdir()) == ["graphs", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]


def test_compile_with_force_fills_an_empty_working_folder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert compile(tiny_checkpoint, smallest(Path(), force=True)).path == Path()
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
        # Past the look at the output: the next thing is the checkpoint.
        with pytest.raises(CheckpointError, match="found nothing there"):
            compile(tmp_path / "missing.pt", CompileOptions(output, force=True))
        return
    message = "is no bundle, so --force does not replace it: give another" if force else "exists: give another"
    with pytest.raises(UsageError, match=message):
        compile(tmp_path / "missing.pt", CompileOptions(output, force=force))
    assert output.is_file() == (kind == "file")


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/sg-export/out"])
def test_compile_where_nothing_can_be_made_raises(place: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out: cannot be written \(.+\): give another --output$"):
        compile(tiny_checkpoint, CompileOptions(tmp_path / place))


def test_compile_of_a_checkpoint_it_cannot_read_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        compile(tmp_path / "missing.pt", CompileOptions(tmp_path / "a/b/out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stage", "existing"), [("tracing dense", False), ("checking dense", True)])
def test_compile_that_is_interrupted_leaves_what_was_there(
    stage: str, existing: bool, tiny_checkpoint: Path, tmp_path: Path
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
        compile(tiny_checkpoint, smallest(tmp_path / "out", force=existing), report)
    assert content(tmp_path) == ({"out/manifest.json": b'{"created_by": "sg-export 0"}'} if existing else {})


def test_compile_interrupted_while_it_takes_the_place_brings_the_old_bundle_back(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        compile(tiny_checkpoint, smallest(tmp_path / "out", force=True))
    assert content(tmp_path) == {"out/manifest.json": b'{"created_by": "sg-export 0"}'}


def test_compile_to_a_folder_named_by_a_detour_raises(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data").write_text("precious")
    with pytest.raises(UsageError, match="exists: give another --output"):
        compile(tiny_checkpoint, smallest(tmp_path / "mine/absent/.."))
    assert (tmp_path / "mine/data").read_text() == "precious"


def test_compile_to_an_output_that_appears_meanwhile_raises(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def report(at: str, done: int, total: int | None) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(UsageError, match="exists: give another --output"):
        compile(tiny_checkpoint, smallest(tmp_path / "out"), report)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("opset", [19, 23])
def test_compile_options_of_another_opset_raise(opset: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"opset: expected 20 to 22, found {opset}"):
        CompileOptions(tmp_path, opset=opset)


def test_compile_of_a_graph_that_differs_from_pytorch_raises(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sg_export.compiler, "MAX_BUILD_ERROR", 0.0)
    with pytest.raises(
        ExportError, match=r"graph condition.onnx: relative L2 distance to PyTorch: expected at most 0, found .*e-0"
    ):
        compile(tiny_checkpoint, smallest(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_compile_of_a_network_that_overflows_raises(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state()
    state["t_embedder.mlp.2.weight"] *= 1e38
    state["final_layer.adaLN_modulation.1.weight"] *= 1e10
    path = tiny.save(tmp_path / "huge.safetensors", state)
    with pytest.raises(ExportError, match=r"graph condition.onnx: .* found nan"):
        compile(path, smallest(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["huge.safetensors"]


@pytest.mark.parametrize(
    ("options", "strong", "weak", "names"),
    [
        ({}, FULL, HALF, ["condition", "dense", "sparse-8", "guided-16-8"]),
        ({"strong_sparsity": (0.25,)}, MOST, HALF, ["condition", "sparse-12", "sparse-8", "guided-12-8"]),
        (
            {"sparsity": (0.5, 0.25), "strong_sparsity": (0, 0.5)},
            FULL,
            HALF,
            ["condition", "dense", "sparse-12", "sparse-8", "guided-16-8", "guided-16-12"],
        ),
        ({"guidance": "cfg"}, FULL, FULL, ["condition", "dense"]),
        ({"guidance": "none", "strong_sparsity": (0.5, 0)}, HALF, HALF, ["condition", "dense", "sparse-8"]),
    ],
    ids=["default", "sparse strong", "pairs", "cfg", "none"],
)
def test_plan_build_of_rates_gives_plan_and_graphs(
    options: dict[str, Any], strong: Level, weak: Level, names: list[str], loaded: LoadedModel
) -> None:
    plan, specs = plan_build(loaded, CompileOptions(Path("out"), **options))
    assert plan == GuidancePlan(options.get("guidance", "sg"), strong, weak, 2.0)
    assert [spec.name for spec in specs] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": (0.5, 0.51)}, "sparsities 0.5 and 0.51 both keep 8 tokens: give one of them"),
        ({"sparsity": (0.5, 0.5)}, "sparsities 0.5 and 0.5 both keep 8 tokens"),
        ({"strong_sparsity": (0.0, 0.25, 0.26)}, "sparsities 0.25 and 0.26 both keep 12 tokens"),
        ({"strong_sparsity": (0.0, 0.25), "sparsity": (0.5, 0.26)}, "sparsities 0.25 and 0.26 both keep 12 tokens"),
        ({"sparsity": (0.25,), "strong_sparsity": (0.5,)}, "expected a weak branch sparser than the strong one"),
        ({"sparsity": (0.5,), "strong_sparsity": (0.5,)}, "found sparsity 0.5 (weak, 8 tokens) and 0.5 (strong"),
        ({"sparsity": (0.0,)}, "sparsity 0: keeps all tokens: expected a weak branch that leaves some out"),
        ({"sparsity": (0.01,)}, "sparsity 0.01: keeps all tokens of 16: expected one that keeps some"),
        ({"sparsity": (1.0,)}, "sparsity 1: expected at least 0 and less than 1"),
        ({"strong_sparsity": (-0.5,)}, "sparsity -0.5: expected at least 0 and less than 1"),
        ({"strong_sparsity": (math.nan,)}, "sparsity nan: expected at least 0 and less than 1"),
        ({"scale": math.inf}, "scale: expected a finite float32 number, found inf"),
        ({"scale": math.nan}, "scale: expected a finite float32 number, found nan"),
    ],
)
def test_plan_build_of_a_request_that_cannot_be_served_says_why(
    options: dict[str, Any], message: str, loaded: LoadedModel
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_build(loaded, CompileOptions(Path("out"), **options))
    assert message in str(caught.value)


def test_plan_build_of_edm_model_raises(loaded: LoadedModel) -> None:
    edm = replace(loaded, facts=replace(loaded.facts, prediction="edm"))
    with pytest.raises(UsageError, match="expected a flow model, found edm, which this version can load and inspect"):
        plan_build(edm, CompileOptions(Path("out")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, found 0"),
        ({"steps": -3}, "steps: expected at least 1, found -3"),
        ({"strong_sparsity": ()}, "strong_sparsity: expected at least one, found none"),
        ({"guidance": "cfg", "sparsity": (0.5,)}, "sparsity: cfg guidance has no sparser branch: give strong_sparsity"),
        ({"guidance": "none", "sparsity": (0.5,)}, "sparsity: none guidance has no sparser branch"),
    ],
)
def test_compile_options_out_of_range_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompileOptions(Path("out"), **options)


def write_model(path: Path, nodes: list[onnx.NodeProto], rows: int = 2) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("NoSuchOperator", ["x"], ["y"]),
        helper.make_node("Relu", ["absent"], ["y"]),
        helper.make_node("Concat", ["x", "x"], ["y"], axis=0),
    ],
    ids=["operator", "input", "shape"],
)
def test_check_graph_of_a_wrong_graph_raises(node: onnx.NodeProto, tmp_path: Path) -> None:
    path = write_model(tmp_path / "wrong.onnx", [node])
    with pytest.raises(ExportError, match=rf"^graph wrong.onnx: ONNX {onnx.__version__} refuses it: "):
        check_graph(path)


def test_check_graph_of_a_right_graph_leaves_it_alone(tmp_path: Path) -> None:
    path = write_model(tmp_path / "right.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    before = path.read_bytes()
    check_graph(path)
    assert content(tmp_path) == {"right.onnx": before}
