"""Every kind of guidance, from a checkpoint to images: build, verify, generate."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sg_export.loading import load_model, load_weak
from sg_export.parity import two_pass
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import of_classes
from sg_runtime.guidance import levels
from sg_runtime.manifest import GuidancePlan, Level

FULL, HALF = Level(0.0, 16), Level(0.5, 8)
STRONG, WEAK = "late.safetensors", "early.safetensors"
# FP32 rounding through at most three evaluations, which guidance amplifies. Another mode differs by
# 1e-2 or more.
BOUND = 1e-4


@dataclass(frozen=True)
class Mode:
    """Options of build, the resulting plan, and the graphs besides the condition."""

    words: tuple[Any, ...]
    plan: GuidancePlan
    graphs: tuple[str, ...]


MODES = {
    "sg": Mode((), GuidancePlan("sg", FULL, HALF, 2.0), ("dense", "sparse-8", "guided-16-8")),
    "cfg": Mode(
        ("--guidance", "cfg", "--scale", 1.5), GuidancePlan("cfg", FULL, FULL, 1.5), ("dense", "guided-16-16-null")
    ),
    "cfg+sg": Mode(
        ("--guidance", "cfg+sg", "--sparsity", 0.5),
        GuidancePlan("cfg+sg", FULL, HALF, 2.0),
        ("dense", "sparse-8", "guided-16-8-null"),
    ),
    "none": Mode(
        ("--guidance", "none", "--strong-sparsity", 0.5), GuidancePlan("none", HALF, HALF, 2.0), ("sparse-8",)
    ),
    "autoguidance": Mode(
        ("--weak-checkpoint", WEAK, "--sparsity", 0),
        GuidancePlan("autoguidance", FULL, FULL, 2.0),
        ("dense", "weak-condition", "weak-dense"),
    ),
    "scheduled": Mode(
        (
            *("--schedule", "cosine", "--sparsity", 0.5, "--sparsity", 0),
            *("--strong-sparsity", 0, "--strong-sparsity", 0.5),
            *("--scale", "3:1", "--interval", 0.3, 0.9),
        ),
        GuidancePlan("sg", FULL, HALF, 3.0, HALF, FULL, 1.0, (0.3, 0.9)),
        ("dense", "sparse-8", "guided-16-8"),
    ),
    "edm": Mode(("--prediction", "edm"), GuidancePlan("sg", FULL, HALF, 2.0), ("dense", "sparse-8", "guided-16-8")),
}


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return MODES[request.param]


@pytest.fixture(scope="module")
def built(mode: Mode, quick: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a mode, for one image at a time, next to its checkpoints."""
    from click.testing import CliRunner

    from sg_export.cli import main

    folder = tmp_path_factory.mktemp("modes")
    checkpoint, weak = quick.save(folder / STRONG), quick.save(folder / WEAK, quick.state(seed=2))
    words = [weak if word == WEAK else word for word in mode.words]
    settings = ["--batch", 1, "--steps", 3, "--quiet", "-o", folder / "bundle"]
    result = CliRunner().invoke(main, [str(word) for word in ("build", checkpoint, *words, *settings)])
    assert (result.exit_code, result.output) == (0, "")
    return folder / "bundle"


def test_build_of_every_mode_has_its_plan_and_graphs(mode: Mode, built: Path) -> None:
    manifest = Bundle.open(built).manifest
    assert manifest.guidance == mode.plan
    assert [graph.name for graph in manifest.graphs] == ["condition", *mode.graphs]


def test_verify_of_every_mode_passes(mode: Mode, built: Path, cli: Callable[..., Any]) -> None:
    result = cli("verify", built)
    assert result.exit_code == 0, result.output
    content = json.loads((built / "verify.json").read_text())
    assert content["passed"] is True
    assert (content["weak_source"] is None) == (mode.plan.mode != "autoguidance")
    for name in ("condition", *mode.graphs, f"10 heun steps, {mode.plan.mode}"):
        assert name in result.stdout


def test_generate_of_every_mode_is_what_two_passes_give(
    mode: Mode, built: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    result = cli("generate", built, "--class", 3, "--class", 1, "--seed", 8, "-o", tmp_path / "x.npy")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/x.npy: 2 images\n"), result.output
    manifest = Bundle.open(built).manifest
    loaded = load_model(built.with_name(STRONG))
    wanted = two_pass.sample(
        replace(loaded, facts=manifest.model, sampling=manifest.sampling),
        mode.plan,
        of_classes(manifest.model.labels, [3, 1]),
        [8, 9],
        3,
        manifest.sampling.sampler,
        weak=load_weak(built.with_name(WEAK), loaded, None) if mode.plan.mode == "autoguidance" else None,
        levels=levels(manifest),
        weak_levels=levels(manifest, mode.plan.row.weak_network),
    )
    assert np.linalg.norm(np.load(tmp_path / "x.npy") - wanted) <= BOUND * np.linalg.norm(wanted)
