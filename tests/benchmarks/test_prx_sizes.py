"""Costs of PRX are closed forms of its shape: the recorded ones, and what the script counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prx_models import CONTEXT, Shape
from benchmarks.prx_sizes import SHAPES, STEPS, measure
from sg_runtime.manifest import Route

pytestmark = pytest.mark.slow

RECORDED = json.loads((Path(__file__).parents[2] / "benchmarks/results/prx_sizes.json").read_text())
BY_WAY = {(row["size"], row["way"]): row for row in RECORDED["rows"]}


def linear_gmac(shape: Shape) -> dict[str, float]:
    """Return the linear multiply-adds of an image and step by way, in 10⁹, at γ 0/0.5."""
    config = shape.config
    tokens, width, depth = config.tokens, config.width, config.depth
    routed = shape.route.end - shape.route.start + 1
    before, after = shape.route.start, depth - 1 - shape.route.end
    block = (3 + 1 + 3 * 3.5) * width**2 * tokens
    ends = 2 * config.channels * config.patch**2 * width * tokens
    condition = (256 + (1 + 6 * depth + 2) * width) * width
    prompt = (CONTEXT + 2 * depth * width) * width * config.text_tokens
    passed = depth * block + ends + condition + prompt
    branches = 1.5 * routed + 2 * after
    macs = {
        "sg": (before + branches) * block + ends + condition + prompt / STEPS,
        "cfg+sg": (2 * before + branches) * block + ends + condition + 2 * prompt / STEPS,
        "cfg": 2 * depth * block + ends + condition + 2 * prompt / STEPS,
        "unguided": depth * block + ends + condition + prompt / STEPS,
        "cfg, passes": 2 * passed,
        "sg, passes": 2 * passed - routed * block / 2,
        "unguided, passes": passed,
    }
    # A graph without shared text embeds once for both branches, and combines them before the head.
    return {way: count / 1e9 for way, count in macs.items()}


@pytest.mark.parametrize("size", SHAPES)
def test_recorded_costs_are_closed_forms(size: str) -> None:
    expected = linear_gmac(SHAPES[size])
    assert {way for own, way in BY_WAY if own == size} == set(expected)
    for way, macs in expected.items():
        assert BY_WAY[size, way]["linear_gmac"] == pytest.approx(macs, abs=2e-3)


def test_recorded_step_at_1024_is_within_its_target() -> None:
    assert BY_WAY["flux VAE, 1024²", "sg"]["of_cfg"] <= 0.76


def test_recorded_step_reads_every_weight_once() -> None:
    def weights(way: str) -> Any:
        return BY_WAY["flux VAE, 1024²", way]["weight_gb"]

    assert weights("sg") == pytest.approx(weights("unguided"), rel=1e-3)
    assert weights("cfg+sg") < 0.34 * weights("cfg, passes")


def test_measure_counts_what_the_shape_says() -> None:
    shape = Shape(picture=64, channels=16, patch=2, width=64, depth=3, text_tokens=8, route=Route(1, 1))
    for row in measure("small", shape):
        assert row.linear_gmac == round(linear_gmac(shape)[row.way], 3)
        assert row.of_cfg == pytest.approx(linear_gmac(shape)[row.way] / linear_gmac(shape)["cfg, passes"], abs=1e-4)
