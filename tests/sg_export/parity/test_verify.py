"""Parity by Polygraphy: the comparisons, and the conditions under which they pass or fail."""

import itertools
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import polygraphy
import pytest
import torch
from earlier_schemas import as_schema_5

from sg_export import checkpoint
from sg_export.compiler import compile
from sg_export.loading import load_model, reload_checkpoint, reload_weak
from sg_export.options.compile import CompileOptions
from sg_export.options.types import BASES
from sg_export.parity.compare import Comparison, Parity, compare_arrays, write_parity
from sg_export.parity.verify import TIMES, verify
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, CheckpointError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import FileFacts, Labels, write_manifest


@pytest.fixture(scope="module")
def glyphs_parity(glyphs_bundle: Path) -> tuple[Parity, list[tuple[str, int, int | None]]]:
    """The comparisons of the reference bundle, and the stages that were reported."""
    stages: list[tuple[str, int, int | None]] = []
    return verify(glyphs_bundle, report=lambda *stage: stages.append(stage)), stages


@pytest.mark.slow
def test_verify_of_reference_bundle_passes(glyphs_parity: tuple[Parity, list[Any]]) -> None:
    parity, _ = glyphs_parity
    assert parity.passed
    assert all(comparison.passed for comparison in parity.comparisons)
    assert parity.commands == ()


@pytest.mark.slow
def test_verify_compares_every_graph_over_time(glyphs_parity: tuple[Parity, list[Any]], glyphs_bundle: Path) -> None:
    assert len(TIMES) >= 8
    assert (min(TIMES), max(TIMES)) == (0.02, 0.98)
    parity, _ = glyphs_parity
    graphs = [comparison for comparison in parity.comparisons if comparison.time is not None]
    expected = [
        (graph.name, t, output.name)
        for graph in Bundle.open(glyphs_bundle).manifest.graphs
        for t in TIMES
        for output in graph.outputs
    ]
    assert [(c.subject, c.time, c.output) for c in graphs] == expected
    assert {output for *_, output in expected} == {"modulations", "prediction", "next"}
    assert {comparison.gate for comparison in graphs} == {BASES["fp32"].gates.graph}
    # The two programs add in different orders: equal results would mean that one was compared with
    # itself.
    assert all(comparison.max_abs > 0 for comparison in graphs)


def runs(parity: Parity) -> list[str]:
    """Return the names of the complete runs, without sampler and place.

    Checks that every name has runs with all samplers and in all places.
    """
    found = [comparison.subject for comparison in parity.comparisons if comparison.time is None]
    names = list(dict.fromkeys(name.split("steps, ")[1].split(" in ")[0] for name in found))
    expected = []
    for name, sampler in itertools.product(names, ("euler", "heun")):
        places = {"none": [""], "autoguidance": [" in two graphs"]}.get(
            name.split()[0], [" in one graph", " in two graphs"]
        )
        expected += [f"10 {sampler} steps, {name}{place}" for place in places]
    assert found == expected
    return names


@pytest.mark.slow
def test_verify_compares_whole_runs_of_every_pair(glyphs_parity: tuple[Parity, list[Any]]) -> None:
    parity, _ = glyphs_parity
    pairs = [f"sg {strong}/{weak}" for strong in ("0", "0.25") for weak in ("0.5", "0.75")]
    assert runs(parity) == [*pairs, "none 0"]
    whole = [comparison for comparison in parity.comparisons if comparison.time is None]
    assert {(run.output, run.gate) for run in whole} == {("samples", BASES["fp32"].gates.run)}


@pytest.mark.slow
def test_verify_reports_each_stage(glyphs_parity: tuple[Parity, list[Any]]) -> None:
    _, stages = glyphs_parity
    assert stages[0][:3] == ("comparing condition", 0, 27)
    assert [done for _, done, *_ in stages] == list(range(27))
    assert stages[-1][0] == "comparing 10 heun steps, none 0"


# By bundle: the graphs and the complete runs that are compared.
@pytest.mark.parametrize(
    ("name", "graphs", "expected"),
    [
        (
            "tiny_cfg",
            ["condition", "dense", "sparse-12", "guided-16-16-null", "guided-12-12-null"],
            ["cfg 0", "cfg 0.25", "none 0"],
        ),
        (
            "tiny_cfg_sg",
            ["condition", "sparse-12", "sparse-8", "guided-12-8-null"],
            ["cfg+sg 0.25/0.5", "none 0.25"],
        ),
        (
            "tiny_autoguidance",
            ["condition", "dense", "weak-condition", "weak-dense", "weak-sparse-8"],
            ["autoguidance 0/0.5", "autoguidance 0/0", "none 0"],
        ),
        (
            "tiny_cosine",
            ["condition", "dense", "sparse-12", "sparse-8", "guided-16-8", "guided-12-8"],
            ["sg 0:0.25/0.5:0", "sg 0/0.5", "sg 0.25/0.5", "none 0"],
        ),
        ("tiny_edm", ["condition", "sparse-12", "sparse-8", "guided-12-8"], ["sg 0.25/0.5", "none 0.25"]),
    ],
)
def test_verify_of_every_mode_passes_in_graphs_and_runs(
    name: str, graphs: list[str], expected: list[str], request: pytest.FixtureRequest
) -> None:
    parity = verify(request.getfixturevalue(f"{name}_bundle"), times=(0.02, 0.98))
    assert parity.passed, [comparison for comparison in parity.comparisons if not comparison.passed]
    assert list(dict.fromkeys(c.subject for c in parity.comparisons if c.time is not None)) == graphs
    assert runs(parity) == expected


def test_verify_of_a_plan_without_guidance_runs_it_once(quick_checkpoint: Path, tmp_path: Path) -> None:
    bundle = compile(quick_checkpoint, CompileOptions(tmp_path / "out", guidance="none", batch=1)).path
    parity = verify(bundle, quick_checkpoint, times=(0.5,))
    assert parity.passed
    assert runs(parity) == ["none 0"]


def test_verify_of_an_untrained_network_passes(untrained: Path, tmp_path: Path) -> None:
    bundle = compile(untrained, CompileOptions(tmp_path / "out", (0.5,), batch=1)).path
    parity = verify(bundle, untrained, times=(0.5,))
    assert parity.passed
    (condition,) = (c for c in parity.comparisons if c.subject == "condition")
    assert condition.relative_l2 == 0.0
    assert condition.cosine == pytest.approx(1.0, abs=1e-15)  # equal values; a quotient of FP64 sums


def test_verify_of_a_network_that_overflows_in_pytorch_blames_the_checkpoint(
    fixed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*arguments: Any) -> Any:
        loaded = reload_checkpoint(*arguments)
        loaded.model.network.x_embedder.proj.weight.fill_(math.inf)
        return loaded

    monkeypatch.setattr("sg_export.parity.verify.reload_checkpoint", overflowing)
    monkeypatch.setattr("sg_export.parity.two_pass.sample", lambda *_, **__: pytest.fail("the graphs come first"))
    with pytest.raises(CheckpointError, match=r"^tiny.safetensors: expected finite values .* in PyTorch, found NaN or"):
        verify(fixed_bundle, times=(0.5,))


def test_verify_of_runs_that_overflow_in_pytorch_blames_the_checkpoint(
    fixed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = np.full((2, 2, 8, 8), np.inf, np.float32)
    monkeypatch.setattr("sg_export.parity.two_pass.sample", lambda *_, **__: lost)
    with pytest.raises(CheckpointError, match=r"^tiny.safetensors: .* for 10 euler steps, sg 0.25/0.5"):
        verify(fixed_bundle, times=(0.5,))


@pytest.mark.slow
@pytest.mark.usefixtures("small_decoder")
def test_verify_of_masked_bundle_passes(tiny_masked: Any, tmp_path: Path) -> None:
    one_block = replace(tiny_masked, config=replace(tiny_masked.config, depth=1))
    checkpoint = one_block.save(tmp_path / "masked.safetensors")
    options = CompileOptions(tmp_path / "out", (0.5,), (0.25,), guidance="cfg+sg", batch=1)
    parity = verify(compile(checkpoint, options).path, times=(0.5,))
    assert parity.passed, [comparison for comparison in parity.comparisons if not comparison.passed]
    assert runs(parity) == ["cfg+sg 0.25/0.5", "none 0.25"]


def altered(bundle: Path, copy: Path, tensor: str, factor: float, file: str = "weights.bin") -> Path:
    """Return a copy of a bundle with one weight of a weights file scaled.

    The manifest of the copy matches the file.
    """
    shutil.copytree(bundle, copy)
    graphs = [onnx.load(path, load_external_data=False) for path in (copy / "graphs").glob("*.onnx")]
    (entries,) = {
        tuple((entry.key, entry.value) for entry in initializer.external_data)
        for graph in graphs
        for initializer in graph.graph.initializer
        if initializer.name == tensor and initializer.external_data[0].value == file
    }
    offset, length = (int(dict(entries)[key]) for key in ("offset", "length"))
    weights = copy / "graphs" / file
    content = bytearray(weights.read_bytes())
    values = np.frombuffer(content, np.float32, length // 4, offset)
    values *= np.float32(factor)
    weights.write_bytes(content)
    manifest = Bundle.open(copy, verify_hashes=False).manifest
    facts = FileFacts(weights.stat().st_size, sha256_of(weights))
    write_manifest(replace(manifest, files={**manifest.files, f"graphs/{file}": facts}), copy / "manifest.json")
    return copy


# Half a percent of one block's output is at least ten times the gate.
@pytest.mark.parametrize(
    ("tensor", "factor", "failing"),
    [
        ("blocks.1.mlp.fc2.weight.T", 1.005, {"sparse-12", "sparse-8", "guided-12-8"}),
        ("t_embedder.mlp.2.weight", 1.005, {"condition"}),
        ("final_layer.linear.weight.T", math.nan, {"sparse-12", "sparse-8", "guided-12-8"}),
    ],
)
def test_verify_of_altered_weights_fails_the_graphs_that_have_them(
    tensor: str, factor: float, failing: set[str], fixed_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = altered(fixed_bundle, tmp_path / "bundle", tensor, factor)
    parity = verify(bundle, tiny_checkpoint, times=(0.3,))
    assert not parity.passed
    failed = {comparison.subject for comparison in parity.comparisons if not comparison.passed}
    runs = {comparison.subject for comparison in parity.comparisons if comparison.time is None}
    assert failed == failing | runs


def test_verify_of_altered_weak_weights_fails_the_weak_graphs(
    tiny_autoguidance_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensor = "blocks.1.mlp.fc2.weight.T"
    bundle = altered(tiny_autoguidance_bundle, tmp_path / "bundle", tensor, 1.005, "weights-weak.bin")
    weak = tiny_checkpoint.with_name("tiny-weak.safetensors")
    parity = verify(bundle, tiny_checkpoint, weak_checkpoint=weak, times=(0.3,))
    failed = {comparison.subject for comparison in parity.comparisons if not comparison.passed}
    guided = {
        f"10 {sampler} steps, autoguidance 0/{weak} in two graphs"
        for sampler in ("euler", "heun")
        for weak in ("0", "0.5")
    }
    assert failed == {"weak-dense", "weak-sparse-8"} | guided


def test_verify_compares_the_update_of_each_graph(fixed_bundle: Path, tmp_path: Path) -> None:
    """A graph that does not use r gives a correct prediction and an incorrect next."""
    copy = Path(shutil.copytree(fixed_bundle, tmp_path / "bundle"))
    path = copy / "graphs/sparse-8.onnx"
    model = onnx.load(path, load_external_data=False)
    (memory,) = (node for node in model.graph.node if "e" in node.input)
    memory.input[list(memory.input).index("r")] = "x"
    path.write_bytes(model.SerializeToString())
    manifest = Bundle.open(copy, verify_hashes=False).manifest
    files = {**manifest.files, "graphs/sparse-8.onnx": FileFacts(path.stat().st_size, sha256_of(path))}
    write_manifest(replace(manifest, files=files), copy / "manifest.json")
    shutil.copy(fixed_bundle.parent / "tiny.safetensors", tmp_path)
    parity = verify(copy, times=(0.3,))
    assert ("sparse-8", "next") in {(c.subject, c.output) for c in parity.comparisons if not c.passed}
    assert ("sparse-8", "prediction") in {(c.subject, c.output) for c in parity.comparisons if c.passed}


def test_reload_checkpoint_finds_the_file_beside_the_bundle(fixed_bundle: Path) -> None:
    assert reload_checkpoint(Bundle.open(fixed_bundle), None).source.file == "tiny.safetensors"


def test_reload_checkpoint_finds_the_file_in_the_working_folder(
    fixed_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Bundle.open(shutil.copytree(fixed_bundle, tmp_path / "bundle"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        CheckpointError, match=r"tiny.safetensors is neither next to the bundle nor in the current folder"
    ):
        reload_checkpoint(moved, None)
    shutil.copy(tiny_checkpoint, tmp_path / "here")
    assert reload_checkpoint(moved, None).facts == moved.manifest.model


def test_reload_checkpoint_of_reference_needs_no_file(glyphs_bundle: Path) -> None:
    assert reload_checkpoint(Bundle.open(glyphs_bundle), None).source.reference == "glyphs"


@pytest.mark.parametrize("other", ["glyphs", "edited"])
def test_reload_checkpoint_of_another_file_raises(other: str, fixed_bundle: Path, tiny: Any, tmp_path: Path) -> None:
    checkpoint = other if other == "glyphs" else tiny.save(tmp_path / "tiny.safetensors", tiny.state(seed=2))
    with pytest.raises(CheckpointError, match=r"expected SHA-256 \w{12}…, from which .* was built, found"):
        reload_checkpoint(Bundle.open(fixed_bundle), checkpoint)


def test_reload_checkpoint_that_changes_meanwhile_raises(
    fixed_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy(tiny_checkpoint, tmp_path)
    read = checkpoint._in_memory

    def late(*arguments: Any) -> Any:
        os.truncate(path, 0)
        return read(*arguments)

    monkeypatch.setattr(checkpoint, "_in_memory", late)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        reload_checkpoint(Bundle.open(fixed_bundle), path)


def test_reload_checkpoint_takes_the_weights_of_the_key_in_the_manifest(
    fixed_bundle: Path, tiny: Any, tmp_path: Path
) -> None:
    bundle = Bundle.open(fixed_bundle)
    path = tiny.save(tmp_path / "tiny.pt", {"nets": {"g": tiny.state(3), "h": tiny.state(4)}})
    source = load_model(path, weights="nets.g").source
    again = reload_checkpoint(replace(bundle, manifest=replace(bundle.manifest, source=source)), path)
    bias = "network.final_layer.linear.bias"
    assert again.source == source
    assert torch.equal(again.model.state_dict()[bias], tiny.state(3)["final_layer.linear.bias"])


def test_reload_checkpoint_of_missing_file_raises(fixed_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing.pt: expected the checkpoint of .*, tiny.safetensors, found"):
        reload_checkpoint(Bundle.open(fixed_bundle), tmp_path / "missing.pt")


def test_reload_checkpoint_beside_another_manifest_raises(fixed_bundle: Path) -> None:
    bundle = Bundle.open(fixed_bundle)
    other = replace(bundle.manifest, model=replace(bundle.manifest.model, conditions=Labels(5, tuple("abcde"))))
    with pytest.raises(BundleError, match=r"its manifest describes another model than .*: build it again"):
        reload_checkpoint(replace(bundle, manifest=other), None)


def test_reload_weak_finds_the_file_beside_the_bundle(tiny_autoguidance_bundle: Path) -> None:
    bundle = Bundle.open(tiny_autoguidance_bundle)
    strong = reload_checkpoint(bundle, None)
    weak = reload_weak(bundle, None, strong)
    assert weak is not None
    assert weak.source == bundle.manifest.weak_source
    assert weak.facts == strong.facts


def test_reload_weak_of_another_file_raises(
    tiny_autoguidance_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_autoguidance_bundle)
    strong = reload_checkpoint(bundle, None)
    with pytest.raises(CheckpointError, match=r"tiny.safetensors: expected SHA-256 \w{12}…, from which .* was built"):
        reload_weak(bundle, tiny_checkpoint, strong)
    with pytest.raises(CheckpointError, match=r"missing.pt: expected the checkpoint of .*, tiny-weak.safetensors, fou"):
        reload_weak(bundle, tmp_path / "missing.pt", strong)
    moved = Bundle.open(shutil.copytree(tiny_autoguidance_bundle, tmp_path / "bundle"))
    with pytest.raises(CheckpointError, match=r"tiny-weak.safetensors is neither .* nor in .*: give `weak_check"):
        reload_weak(moved, None, strong)


def test_reload_weak_where_there_is_none(fixed_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(fixed_bundle)
    strong = reload_checkpoint(bundle, None)
    assert reload_weak(bundle, None, strong) is None
    with pytest.raises(UsageError, match=r"fixed-bundle: has no weak network: leave out `weak_checkpoint`$"):
        reload_weak(bundle, tiny_checkpoint, strong)


def test_write_parity_holds_what_was_measured(fixed_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(fixed_bundle)
    good = Comparison("dense", "next", 0.5, 1e-6, 2e-7, 1.0, 1e-5, 0.9999, True)
    write_parity(Parity((good, replace(good, time=None, passed=False)), ()), bundle, tmp_path / "verify.json")
    assert [path.name for path in tmp_path.iterdir()] == ["verify.json"]
    content = json.loads((tmp_path / "verify.json").read_text())
    assert content["passed"] is False
    assert content["bundle"] == "fixed-bundle"
    assert content["source"]["sha256"] == bundle.manifest.source.sha256
    assert content["weak_source"] is None
    assert content["versions"] == {
        module.__name__: module.__version__ for module in (torch, onnxruntime, polygraphy, np)
    }
    assert content["comparisons"][0] == {
        "subject": "dense",
        "output": "next",
        "time": 0.5,
        "max_abs": 1e-6,
        "relative_l2": 2e-7,
        "cosine": 1.0,
        "gate": 1e-5,
        "least_cosine": 0.9999,
        "passed": True,
        "overflow": None,
    }
    assert content["comparisons"][1]["time"] is None


def test_write_parity_of_what_is_no_number_is_json(fixed_bundle: Path, tmp_path: Path) -> None:
    lost = Comparison("dense", "next", 0.5, math.nan, math.inf, math.nan, 1e-5, None, False)
    write_parity(Parity((lost,), ()), Bundle.open(fixed_bundle), tmp_path / "verify.json")
    (found,) = json.loads((tmp_path / "verify.json").read_text(), parse_constant=pytest.fail)["comparisons"]
    assert [found[name] for name in ("max_abs", "relative_l2", "cosine")] == [None] * 3


def test_write_parity_of_two_networks_names_both_checkpoints(tiny_autoguidance_bundle: Path, tmp_path: Path) -> None:
    write_parity(Parity((), ()), Bundle.open(tiny_autoguidance_bundle), tmp_path / "verify.json")
    content = json.loads((tmp_path / "verify.json").read_text())
    assert [content[key]["file"] for key in ("source", "weak_source")] == ["tiny.safetensors", "tiny-weak.safetensors"]


def compare(wanted: list[float], found: list[float], gate: float = 1e-5) -> Comparison:
    arrays = np.array(wanted, np.float32), np.array(found, np.float32)
    return compare_arrays("a", "next", 0.5, *arrays, gate, BASES["fp32"].gates.cosine)


def test_compare_arrays_measures_by_hand() -> None:
    found = compare([3.0, 4.0], [3.0, 4.5])
    assert (found.max_abs, found.relative_l2) == (0.5, 0.1)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)), rel=1e-12)  # FP64 rounding
    assert not found.passed


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ([1.0, -2.0, 2.0], True),
        ([1.000001, -2.0, 2.0], True),
        ([1.0001, -2.0, 2.0], False),
        ([-1.0, 2.0, -2.0], False),
        ([0.0, 0.0, 0.0], False),
        ([math.nan, -2.0, 2.0], False),
        ([math.inf, -2.0, 2.0], False),
    ],
)
def test_compare_arrays_passes_within_the_gate_alone(found: list[float], passed: bool) -> None:
    with np.errstate(invalid="ignore"):
        assert compare([1.0, -2.0, 2.0], found).passed is passed


@pytest.mark.parametrize(
    ("gate", "least_cosine", "passed"), [(0.2, None, True), (0.05, None, False), (None, 0.99, True), (None, 1.0, False)]
)
def test_compare_arrays_by_one_gate_alone(gate: float | None, least_cosine: float | None, passed: bool) -> None:
    wanted, found = np.array([3, 4], np.float32), np.array([3, 4.5], np.float32)
    assert compare_arrays("a", "next", 0.5, wanted, found, gate, least_cosine).passed is passed
    assert not compare_arrays("a", "next", 0.5, wanted, found * np.float32(math.nan), None, None).passed


def test_compare_arrays_of_other_direction_fails_within_a_wide_gate() -> None:
    assert not compare([1.0, 0.0], [1.0, 0.1], gate=0.5).passed
    assert compare([1.0, 0.0], [1.1, 0.0], gate=0.5).passed


def test_verify_of_a_bundle_of_an_earlier_schema_says_how_to_rebuild_it(
    tiny_bundle: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(as_schema_5(content)))
    with pytest.raises(BundleError, match=r"found one of an earlier version: it runs, .* rebuild it: sg-export build"):
        verify(copy, tiny_checkpoint)
