"""The grid, the costs and the kept samples of `quality_glyphs`. Metrics: `test_glyph_metrics`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from benchmarks.glyph_judge import ClassifierFacts, Figures
from benchmarks.glyph_report import Row
from benchmarks.guidance_grid import LABELS, Setting, step_gmac
from benchmarks.quality_glyphs import COSINE, FULL, QUICK, Budget, Sampler, best, compiled, kept_rows
from examples.glyphs import CLASS_NAMES
from sg_export.options.compile import CompileOptions
from sg_runtime import Pipeline
from sg_runtime.manifest import GuidanceMode, Manifest

FALLING = Setting("autoguidance", 1.5, 0.0, (0.5, 0.0))
"""A setting within the sparsities of `tiny_autoguidance_bundle`."""


def macs(manifest: Manifest, kind: str, *keep: int, network: str = "main") -> int:
    """Return the linear multiply-adds of one graph."""
    (graph,) = [
        graph
        for graph in manifest.graphs
        if (graph.kind, graph.network) == (kind, network) and tuple(level.keep for level in graph.levels) == keep
    ]
    return graph.cost.linear_macs


@pytest.mark.parametrize("budget", [FULL, QUICK])
def test_grid_of_a_budget_has_every_guided_mode_and_distinct_names(budget: Budget) -> None:
    modes = [search.guidance for search in budget.searches]
    assert sorted([*modes, "none"]) == sorted(get_args(GuidanceMode)) == sorted(LABELS)
    names = [setting.name for setting in budget.grid]
    assert len(set(names)) == len(names) == sum(len(s.scales) * len(s.pairs) for s in budget.searches)


def test_name_of_settings_says_what_differs() -> None:
    assert Setting("none").name == "unguided"
    assert Setting("none", 1.0, 0.5).name == "unguided at γ 0.5"
    assert Setting("cfg", 1.5).name == "CFG, ω = 1.5"
    assert Setting("cfg", 1.5, 0.5).name == "CFG at γ 0.5, ω = 1.5"
    assert Setting("cfg+sg", 2.0, 0.25, 0.75).name == "CFG + SG 0.25/0.75, ω = 2"
    assert Setting("autoguidance", 3.0, COSINE, COSINE[::-1]).name == "AutoGuidance + SG 0→0.6/0.6→0, ω = 3"


def test_step_gmac_of_guided_modes_is_that_of_the_guided_graph(tiny_bundle: Path, tiny_cfg_sg_bundle: Path) -> None:
    sg, cfg_sg = Pipeline.load(tiny_bundle), Pipeline.load(tiny_cfg_sg_bundle)
    guided = macs(sg.bundle.manifest, "guided", 12, 8)  # of 16 tokens, at 0.25 and 0.5
    assert step_gmac(sg, Setting("sg", 2.0, 0.25, 0.5), steps=3) == pytest.approx(guided / 1e9)
    guided = macs(cfg_sg.bundle.manifest, "guided", 12, 8)
    assert step_gmac(cfg_sg, Setting("cfg+sg", 2.0, 0.25, 0.5), steps=3) == pytest.approx(guided / 1e9)


def test_step_gmac_unguided_is_that_of_the_dense_graph(tiny_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_bundle)
    assert step_gmac(pipe, Setting("none"), steps=3) == pytest.approx(macs(pipe.bundle.manifest, "dense", 16) / 1e9)


def test_step_gmac_of_a_schedule_is_the_mean_over_its_steps(tiny_autoguidance_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_autoguidance_bundle)
    manifest = pipe.bundle.manifest
    first = macs(manifest, "dense", 16) + macs(manifest, "sparse", 8, network="weak")
    last = macs(manifest, "dense", 16) + macs(manifest, "dense", 16, network="weak")
    assert first != last
    assert step_gmac(pipe, FALLING, steps=2) == pytest.approx((first + last) / 2 / 1e9)


def test_compiled_search_asks_for_the_sparsities_of_its_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CompileOptions] = []

    def compile(checkpoint: str, options: CompileOptions) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(path=options.output)

    monkeypatch.setattr("sg_export.compile", compile)
    for search in FULL.searches:
        assert compiled(search, tmp_path / search.guidance) == tmp_path / search.guidance
    found = {options.mode: (options.strong_sparsity, options.sparsity, options.weak_checkpoint) for options in asked}
    assert found == {
        "cfg": ((0.0,), (), None),
        "sg": ((0.0, 0.25), (0.5, 0.75, 0.9), None),
        "cfg+sg": ((0.0, 0.25), (0.5, 0.75), None),
        "autoguidance": (COSINE, (0.0, 0.6, 0.4, 0.2), "glyphs-early"),
    }


def test_samples_asked_for_again_are_read_from_the_folder(glyphs_bundle: Path, tmp_path: Path) -> None:
    pipe = Pipeline.load(glyphs_bundle, batch=31)
    sampler = Sampler({"sg": pipe, "none": pipe}, tmp_path, steps=1)
    setting = Setting("sg", 2.0, (0.0, 0.25), (0.75, 0.5))
    images, classes = sampler.samples(setting, per_class=1, block=3)
    assert images.shape == (62, 16, 16)
    assert classes.tolist() == list(range(len(CLASS_NAMES)))
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    np.testing.assert_array_equal(sampler.samples(setting, per_class=1, block=3)[0], images)
    assert kept.stat().st_mtime_ns == written
    unguided, _ = sampler.samples(Setting("none"), per_class=1, block=3)
    assert (unguided != images).any()
    assert len(list(tmp_path.iterdir())) == 2


def test_best_of_a_mode_is_nearest_to_the_held_out_fonts() -> None:
    grid = (Setting("cfg", 1.1), Setting("sg", 2.0, 0.0, 0.5), Setting("sg", 3.0, 0.0, 0.5))
    rows = [Row("", None, None, (Figures(0.9, 0.9, 1.0, distance, 1.0, 1.0, 0.0),)) for distance in (0.1, 0.5, 0.4)]
    assert best(rows, grid, "sg") == grid[2]
    assert best(rows, grid, "cfg") == grid[0]


def test_kept_rows_are_those_of_the_same_checkpoint_classifier_and_protocol(tmp_path: Path) -> None:
    reader, path = ClassifierFacts(100, 0.99, 1.0, (("O", "0", 3),)), tmp_path / "earlier.json"
    row = Row("SG", {"scale": 2.0}, 0.1, (Figures(0.9, 0.9, 1.0, 2.0, 3.0, 4.0, 0.0),))
    content = {
        "checkpoints": {"main": {"sha256": "aa"}},
        "read_held_out": asdict(reader),
        "protocol": asdict(QUICK),
        "measured": [asdict(row)],
        "searched": [],
    }
    path.write_text(json.dumps(content))
    assert kept_rows(path, "aa", reader, QUICK) == {("measured", "SG"): replace(row, kept=True)}
    assert kept_rows(path, "bb", reader, QUICK) == {}
    assert kept_rows(path, "aa", replace(reader, accuracy=0.98), QUICK) == {}
    assert kept_rows(path, "aa", reader, replace(QUICK, measured=3)) == {}
    assert kept_rows(path, "aa", reader, replace(QUICK, blocks=(4,))) == {}
    assert kept_rows(tmp_path / "none.json", "aa", reader, QUICK) == {}
