"""Checks of the parts, run on the CPU as far as it can."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from benchmarks.gpu import bundles, patterns, step_form
from benchmarks.gpu.checks import correctness, speed
from benchmarks.gpu.child import Context
from sg_export.parity.compare import Comparison, Parity, write_parity
from sg_runtime.bundle import Bundle
from sg_runtime.pipeline import Pipeline


@pytest.fixture
def context(tmp_path: Path, glyphs_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Return a context of the CPU in which the bundle of `glyphs` is built already."""
    monkeypatch.setattr(bundles, "TARGET", {})
    (tmp_path / "glyphs-fp32-any-plain").symlink_to(glyphs_bundle)
    monkeypatch.setattr(correctness, "BUNDLES", {"FP32, any batch": ("fp32", None)})
    return Context(tmp_path, tmp_path / "xl", "cpu", "onnxruntime-cpu")


def test_results_and_nodes_on_the_cpu_pass(context: Context) -> None:
    found = [*correctness.results(context), *correctness.nodes_and_captures(context)]
    assert [finding.passed for finding in found] == [True] * 5
    assert found[0].setting == "FP32, any batch, euler, CUDA graphs"
    assert found[0].figures[0].median == 0
    assert found[0].figures[0].samples == 4


def test_results_of_another_model_fail(context: Context, glyphs_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Pipeline.load(glyphs_bundle, "cpu").sample([3, 4], [5, 6], steps=8)
    monkeypatch.setattr(correctness, "reference", lambda *_: wrong)
    finding = next(correctness.results(context))
    assert finding.passed is False
    assert finding.said.startswith("expected at most 0.0001, found ")


def test_distance_of_nan_fails() -> None:
    good = np.ones(3, np.float32)
    assert correctness.distance("", [good, good + np.float32(1e-6)], good, 1e-5).passed
    assert correctness.distance("", [good, good * np.nan], good, 1e-5).passed is False


def test_drop_pipelines_compares_all_samples(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    correctness.drop_pipelines("released", context.scratch / "glyphs-fp32-any-plain", context)
    assert capsys.readouterr().out == "relative L2 at most 0.0e+00\n"


def test_disturbed_capture_on_the_cpu_passes(context: Context) -> None:
    disturbed, after, told = correctness.disturbed_capture(context)
    assert disturbed.passed
    assert after.passed
    assert told.said == "none"


def test_warnings_of_runtime_are_collected_inside_only() -> None:
    logger = logging.getLogger("sg_runtime.anything")
    with correctness.warnings_of_runtime() as warned:
        logger.warning("%d nodes are not run by it", 3)
        logger.info("not this")
    logging.getLogger("sg_runtime").warning("nor this")
    assert warned == ["3 nodes are not run by it"]


def test_figures_of_the_file_of_verify_are_its_worst(glyphs_bundle: Path, tmp_path: Path) -> None:
    rows = [Comparison("dense", "next", 0.5, 1.0, value, 1.0, 1e-5, None, True) for value in (1e-7, 3e-7)]
    write_parity(Parity(tuple(rows), ()), Bundle.open(glyphs_bundle), tmp_path / "verify.json")
    worst, count = correctness.figures_of(tmp_path / "verify.json")
    assert (worst.median, count.median) == (3e-7, 2)
    rows.append(Comparison("dense", "next", 0.5, 1.0, math.nan, 1.0, 1e-5, None, False))
    write_parity(Parity(tuple(rows), ()), Bundle.open(glyphs_bundle), tmp_path / "verify.json")
    assert correctness.figures_of(tmp_path / "verify.json")[0].median == math.inf


def test_rows_of_a_step_have_the_products_that_the_graph_counts(glyphs_bundle: Path) -> None:
    """The rest of the graph's products, at both ends, are less than 2 % of it."""
    pipe = Pipeline.load(glyphs_bundle, "cpu")
    manifest, plan = pipe.bundle.manifest, speed.plan_of(pipe, "γ 0/0.5")
    assert plan.weak is not None
    graph = manifest.graph("guided", plan.strong.keep, plan.weak.keep)
    assert graph is not None
    rows = speed.rows_of(manifest, plan, 1)
    assert len(rows) == manifest.model.depth
    products = sum(rows) * 12 * manifest.model.width**2  # qkv 3, proj 1, fc1 and fc2 4 each
    assert 0.98 * graph.cost.linear_macs <= products <= graph.cost.linear_macs
    assert speed.rows_of(manifest, plan, 4) == [4 * count for count in rows]


def test_times_of_a_run_are_those_of_its_steps(glyphs_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "STEPS", 3)
    pipe = Pipeline.load(glyphs_bundle, "cpu")
    step, loop, submit, first = speed.times(pipe, speed.plan_of(pipe, "γ 0/0.5"), 2, 3)
    assert (step.samples, loop.samples, submit.samples, first.samples) == (3, 3, 3, 1)
    assert step.median == pytest.approx(loop.median / 3, rel=1e-3)
    assert 0 < submit.median < loop.median


def run(model: Any, feeds: Any) -> NDArray[Any]:
    """Run a model on the CPU and return its first output."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    output: NDArray[Any] = session.run(None, feeds)[0]
    return output


def test_patterns_in_several_forms_compute_the_same() -> None:
    """FP16 has a relative precision of 1e-3. PackedMultiHeadAttention has no kernel on the CPU."""
    first: dict[str, NDArray[Any]] = {}
    for pattern in patterns.patterns():
        pair, _, form = pattern.name.partition(": ")
        if form == "PackedMultiHeadAttention":
            continue
        found = run(pattern.model, pattern.feeds())
        assert found.shape == pattern.output[2]
        if not pair.startswith("put back"):  # the rows that are put back differ
            np.testing.assert_allclose(found, first.setdefault(pair, found), rtol=5e-3, atol=5e-3)
    assert len(first) == 6


@pytest.mark.parametrize(("attention", "norm"), [("mha", "vector"), ("plain", "affine")])
def test_step_form_computes_what_pytorch_does(attention: str, norm: str) -> None:
    kept, depth = (128, 26), 3
    weights, given = step_form.random_weights(depth), step_form.feeds(kept, depth)
    found = run(step_form.Builder(attention, norm, weights, depth).step(kept), given)
    wanted = step_form.reference(weights, given, kept, depth, "cpu").numpy()
    assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted - given["x"])  # FP16 tokens
