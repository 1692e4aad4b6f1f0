"""Options of a build: valid combinations, the guidance of the bundle, and the graphs it needs."""

import math
from pathlib import Path
from typing import Any

import pytest

from sg_export.loading import LoadedModel, load_model
from sg_export.options.compile import CompileOptions
from sg_export.packing.pairs import choose_graphs
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GuidancePlan, Level

FULL, MOST, HALF = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.mark.parametrize(
    ("options", "strong", "weak", "expected"),
    [
        ({}, FULL, HALF, ["condition", "dense", "sparse-8", "guided-16-8"]),
        ({"strong_sparsity": (0.25,)}, MOST, HALF, ["condition", "sparse-12", "sparse-8", "guided-12-8"]),
        (
            {"sparsity": (0.5, 0.25), "strong_sparsity": (0, 0.5)},
            FULL,
            HALF,
            ["condition", "dense", "sparse-12", "sparse-8", "guided-16-8", "guided-16-12"],
        ),
        ({"guidance": "cfg"}, FULL, FULL, ["condition", "dense", "guided-16-16-null"]),
        (
            {"guidance": "cfg", "strong_sparsity": (0.5, 0)},
            HALF,
            HALF,
            ["condition", "dense", "sparse-8", "guided-8-8-null", "guided-16-16-null"],
        ),
        ({"guidance": "none", "strong_sparsity": (0.5, 0)}, HALF, HALF, ["condition", "dense", "sparse-8"]),
        ({"guidance": "cfg+sg"}, FULL, HALF, ["condition", "dense", "sparse-8", "guided-16-8-null"]),
        (
            {"guidance": "cfg+sg", "sparsity": (0.5, 0.25), "strong_sparsity": (0, 0.25)},
            FULL,
            HALF,
            [
                "condition",
                "dense",
                "sparse-12",
                "sparse-8",
                "guided-16-8-null",
                "guided-16-12-null",
                "guided-12-8-null",
            ],
        ),
    ],
    ids=["default", "sparse strong", "pairs", "cfg", "cfg pairs", "none", "cfg+sg", "cfg+sg pairs"],
)
def test_choose_graphs_of_rates_gives_plan_and_graphs(
    options: dict[str, Any], strong: Level, weak: Level, expected: list[str], loaded: LoadedModel
) -> None:
    plan, specs = choose_graphs(loaded, None, CompileOptions(Path("out"), **options))
    assert plan == GuidancePlan(options.get("guidance", "sg"), strong, weak, 2.0)
    assert [spec.name for spec in specs] == expected


# A weak network has its own sparsities: one may be equal to the strong branch's, lower, or nearly
# equal.
@pytest.mark.parametrize(
    ("options", "strong", "weak", "expected"),
    [
        ({}, FULL, HALF, ["condition", "dense", "weak-condition", "weak-sparse-8"]),
        ({"sparsity": (0.0,)}, FULL, FULL, ["condition", "dense", "weak-condition", "weak-dense"]),
        (
            {"sparsity": (0.0, 0.51), "strong_sparsity": (0.5,), "guidance": "autoguidance"},
            HALF,
            FULL,
            ["condition", "sparse-8", "weak-condition", "weak-dense", "weak-sparse-8"],
        ),
    ],
)
def test_choose_graphs_of_two_networks_has_graphs_of_each(
    options: dict[str, Any], strong: Level, weak: Level, expected: list[str], loaded: LoadedModel
) -> None:
    settings = CompileOptions(Path("out"), weak_checkpoint="weak.pt", **options)
    plan, specs = choose_graphs(loaded, loaded, settings)
    assert plan == GuidancePlan("autoguidance", strong, weak, 2.0)
    assert [spec.name for spec in specs] == expected


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"sparsity": (0.5, 0.25, 0.0), "strong_sparsity": (0.0, 0.25, 0.5)}, (FULL, HALF, HALF, FULL)),
        ({"sparsity": (0.5, 0.0)}, (FULL, HALF, None, FULL)),
        ({"strong_sparsity": (0.0, 0.25)}, (FULL, HALF, MOST, None)),
        ({}, (FULL, HALF, None, None)),
        ({"guidance": "cfg", "strong_sparsity": (0.5, 0.0)}, (HALF, HALF, FULL, FULL)),
        ({"guidance": "none", "strong_sparsity": (0.5, 0.0)}, (HALF, HALF, FULL, FULL)),
        ({"guidance": "cfg+sg", "sparsity": (0.5, 0.25)}, (FULL, HALF, None, MOST)),
    ],
)
def test_choose_graphs_of_a_cosine_goes_from_the_first_to_the_last(
    options: dict[str, Any], ends: tuple[Level, Level, Level | None, Level | None], loaded: LoadedModel
) -> None:
    settings = CompileOptions(Path("out"), schedule="cosine", scale=(3.0, 1.0), interval=(0.2, 0.8), **options)
    strong, weak, strong_last, weak_last = ends
    plan, _ = choose_graphs(loaded, None, settings)
    mode = options.get("guidance", "sg")
    assert plan == GuidancePlan(mode, strong, weak, 3.0, strong_last, weak_last, 1.0, (0.2, 0.8))


def test_choose_graphs_of_a_constant_schedule_takes_the_first(loaded: LoadedModel) -> None:
    settings = CompileOptions(Path("out"), (0.5, 0.75), (0.0, 0.25))
    assert choose_graphs(loaded, None, settings)[0] == GuidancePlan("sg", FULL, HALF, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": (0.5, 0.51)}, "sparsities 0.5 and 0.51 both keep 8 tokens: give one of them"),
        ({"sparsity": (0.5, 0.5)}, "sparsities 0.5 and 0.5 both keep 8 tokens"),
        ({"strong_sparsity": (0.0, 0.25, 0.26)}, "sparsities 0.25 and 0.26 both keep 12 tokens"),
        ({"strong_sparsity": (0.0, 0.25), "sparsity": (0.5, 0.26)}, "sparsities 0.25 and 0.26 both keep 12 tokens"),
        ({"sparsity": (0.25,), "strong_sparsity": (0.5,)}, "expected a weak branch sparser than the strong one"),
        ({"sparsity": (0.5,), "strong_sparsity": (0.5,)}, "found sparsity 0.5 (weak, 8 tokens) and 0.5 (strong"),
        ({"sparsity": (0.0,)}, "sparsity 0 keeps all tokens: use a higher sparsity for the weak branch"),
        ({"sparsity": (0.01,)}, "sparsity 0.01 keeps all 16 tokens: use 0, or a higher sparsity"),
        ({"sparsity": (1.0,)}, "sparsity 1: expected at least 0 and less than 1"),
        ({"strong_sparsity": (-0.5,)}, "sparsity -0.5: expected at least 0 and less than 1"),
        ({"strong_sparsity": (math.nan,)}, "sparsity nan: expected at least 0 and less than 1"),
        ({"scale": math.inf}, "scale: expected a finite float32 number, found inf"),
        ({"scale": math.nan}, "scale: expected a finite float32 number, found nan"),
        ({"scale": (2.0, math.inf)}, "scale: expected a finite float32 number, found inf"),
        ({"interval": (0.9, 0.1)}, "interval: expected 0 <= lowest time <= highest time, found 0.9 to 0.1"),
        ({"interval": (-0.1, 0.5)}, "interval: expected 0 <= lowest time <= highest time, found -0.1 to 0.5"),
        ({"interval": (0.1, math.inf)}, "interval: expected 0 <= lowest time <= highest time, found 0.1 to inf"),
        ({"guidance": "both"}, "guidance: expected one of none, cfg, sg, cfg+sg, autoguidance, found 'both'"),
        ({"guidance": "cfg+sg", "sparsity": (0.0,)}, "sparsity 0 keeps all tokens: use a higher sparsity"),
        (
            {"guidance": "cfg+sg", "sparsity": (0.25,), "strong_sparsity": (0.5,)},
            "a weak branch sparser than the strong",
        ),
        # There is one sparsity of each branch, so nothing changes along a cosine.
        ({"schedule": "cosine", "sparsity": (0.0,)}, "expected a weak branch sparser than the strong one"),
    ],
)
def test_choose_graphs_of_a_request_that_cannot_be_served_says_why(
    options: dict[str, Any], message: str, loaded: LoadedModel
) -> None:
    with pytest.raises(UsageError) as caught:
        choose_graphs(loaded, None, CompileOptions(Path("out"), **options))
    assert message in str(caught.value)


def test_choose_graphs_of_a_weak_rate_that_cannot_be_served_says_why(loaded: LoadedModel) -> None:
    settings = CompileOptions(Path("out"), (0.5, 0.51), weak_checkpoint="weak.pt")
    with pytest.raises(UsageError, match=r"sparsities 0.5 and 0.51 both keep 8 tokens: give one of them"):
        choose_graphs(loaded, loaded, settings)
