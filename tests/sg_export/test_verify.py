"""Parity by Polygraphy: what is compared, what passes, and what does not."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polygraphy
import pytest
import torch

from sg_export.verify import (
    GRAPH_GATE,
    RUN_GATE,
    TIMES,
    Comparison,
    Parity,
    compare_arrays,
    reload_checkpoint,
    verify,
    write_parity,
)
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, CheckpointError
from sg_runtime.manifest import write_manifest


@pytest.fixture(scope="module")
def glyphs_parity(glyphs_bundle: Path) -> tuple[Parity, list[tuple[str, int, int | None]]]:
    """The comparisons of the reference bundle, and the stages that were reported."""
    stages: list[tuple[str, int, int | None]] = []
    return verify(glyphs_bundle, report=lambda *stage: stages.append(stage)), stages


def test_verify_of_reference_bundle_passes(glyphs_parity: tuple[Parity, list[Any]]) -> None:
    parity, _ = glyphs_parity
    assert parity.passed
    assert all(comparison.passed for comparison in parity.comparisons)
    assert parity.commands == ()


def test_verify_compares_every_graph_over_time(glyphs_parity: tuple[Parity, list[Any]], glyphs_bundle: Path) -> None:
    assert len(TIMES) >= 8
    assert (min(TIMES), max(TIMES)) == (0.02, 0.98)
    parity, _ = glyphs_parity
    graphs = [comparison for comparison in parity.comparisons if comparison.time is not None]
    names = [Path(graph.file).stem for graph in Bundle.open(glyphs_bundle).manifest.graphs]
    assert [(c.subject, c.time) for c in graphs] == list(itertools.product(names, TIMES))
    assert {comparison.gate for comparison in graphs} == {GRAPH_GATE}
    # Two programs that add in different orders: all equal would mean that one was compared with itself.
    assert all(comparison.max_abs > 0 for comparison in graphs)


def test_verify_compares_whole_runs_of_every_pair(glyphs_parity: tuple[Parity, list[Any]]) -> None:
    parity, _ = glyphs_parity
    runs = [comparison for comparison in parity.comparisons if comparison.time is None]
    pairs = [f"sg {strong}/{weak}" for strong in ("0", "0.25") for weak in ("0.5", "0.75")]
    expected = [
        f"10 {sampler} steps, {pair} in the {where}"
        for pair, sampler, where in itertools.product(pairs, ("euler", "heun"), ("graph", "runtime"))
    ]
    assert [run.subject for run in runs] == [*expected, "10 euler steps, none", "10 heun steps, none"]
    assert {run.gate for run in runs} == {RUN_GATE}


def test_verify_reports_each_stage(glyphs_parity: tuple[Parity, list[Any]]) -> None:
    _, stages = glyphs_parity
    assert stages[0] == ("comparing condition", 0, 27)
    assert [done for _, done, _ in stages] == list(range(27))
    assert stages[-1][0] == "comparing 10 heun steps, none"


def test_verify_of_cfg_bundle_compares_its_runs(cfg_bundle: Path) -> None:
    parity = verify(cfg_bundle, times=(0.5,))
    assert parity.passed
    assert [comparison.subject for comparison in parity.comparisons] == [
        "condition",
        "sparse-12",
        *(f"10 {sampler} steps, cfg in the runtime" for sampler in ("euler", "heun")),
        *(f"10 {sampler} steps, none" for sampler in ("euler", "heun")),
    ]


def altered(bundle: Path, copy: Path, tensor: str, factor: float) -> Path:
    """A copy of a bundle with one weight scaled, and a manifest that fits it."""
    import onnx

    from sg_runtime.files import sha256_of
    from sg_runtime.manifest import FileFacts

    shutil.copytree(bundle, copy)
    graphs = [onnx.load(path, load_external_data=False) for path in (copy / "graphs").glob("*.onnx")]
    (entries,) = {
        tuple((entry.key, entry.value) for entry in initializer.external_data)
        for graph in graphs
        for initializer in graph.graph.initializer
        if initializer.name == tensor
    }
    offset, length = (int(dict(entries)[key]) for key in ("offset", "length"))
    weights = copy / "graphs/weights.bin"
    content = bytearray(weights.read_bytes())
    values = np.frombuffer(content, np.float32, length // 4, offset)
    values *= np.float32(factor)
    weights.write_bytes(content)
    manifest = Bundle.open(copy, verify_hashes=False).manifest
    facts = FileFacts(weights.stat().st_size, sha256_of(weights))
    write_manifest(replace(manifest, files={**manifest.files, "graphs/weights.bin": facts}), copy / "manifest.json")
    return copy


# Ten gates at the least: half a percent of one block's output.
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


def test_reload_checkpoint_finds_the_file_beside_the_bundle(fixed_bundle: Path) -> None:
    assert reload_checkpoint(Bundle.open(fixed_bundle), None).source.file == "tiny.safetensors"


def test_reload_checkpoint_finds_the_file_in_the_working_folder(
    fixed_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Bundle.open(shutil.copytree(fixed_bundle, tmp_path / "bundle"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match=r"tiny.safetensors is neither beside the bundle nor here: give --chec"):
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


def test_reload_checkpoint_of_missing_file_raises(fixed_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing.pt: expected the checkpoint of .*, tiny.safetensors, found"):
        reload_checkpoint(Bundle.open(fixed_bundle), tmp_path / "missing.pt")


def test_reload_checkpoint_beside_another_manifest_raises(fixed_bundle: Path) -> None:
    bundle = Bundle.open(fixed_bundle)
    other = replace(bundle.manifest, model=replace(bundle.manifest.model, class_names=tuple("abcde")))
    with pytest.raises(BundleError, match=r"its manifest describes another model than .*: build it anew"):
        reload_checkpoint(replace(bundle, manifest=other), None)


def test_write_parity_holds_what_was_measured(fixed_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(fixed_bundle)
    good = Comparison("dense", 0.5, 1e-6, 2e-7, 1.0, 1e-5, True)
    write_parity(Parity((good, replace(good, time=None, passed=False)), ()), bundle, tmp_path / "verify.json")
    assert [path.name for path in tmp_path.iterdir()] == ["verify.json"]
    content = json.loads((tmp_path / "verify.json").read_text())
    assert content["passed"] is False
    assert content["bundle"] == "fixed-bundle"
    assert content["source"]["sha256"] == bundle.manifest.source.sha256
    assert content["versions"] == {
        module.__name__: module.__version__ for module in (torch, onnxruntime, polygraphy, np)
    }
    assert content["comparisons"][0] == {
        "subject": "dense",
        "time": 0.5,
        "max_abs": 1e-6,
        "relative_l2": 2e-7,
        "cosine": 1.0,
        "gate": 1e-5,
        "passed": True,
    }
    assert content["comparisons"][1]["time"] is None


def compare(wanted: list[float], found: list[float], gate: float = 1e-5) -> Comparison:
    return compare_arrays("a", 0.5, np.array(wanted, np.float32), np.array(found, np.float32), gate)


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


def test_compare_arrays_of_other_direction_fails_within_a_wide_gate() -> None:
    assert not compare([1.0, 0.0], [1.0, 0.1], gate=0.5).passed
    assert compare([1.0, 0.0], [1.1, 0.0], gate=0.5).passed
