"""What counts as a right picture, how pictures are read, and the figures of a set."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.guidance_grid import LABELS, Setting
from benchmarks.quality_scenes import FULL, QUICK, Budget, winners
from benchmarks.scene_judge import CATEGORIES, SEEN, Figures, Judge, draw_captions, real_pictures, shows
from benchmarks.scene_reader import CELL, Reader, Reading, read
from benchmarks.scene_report import Row
from examples.scenes import COLOURS, NAMES, SIDE, Caption, Placed, draw

FOX, APPLE = Placed("fox", 16.0, 30.0, 20), Placed("apple", 46.0, 34.0, 32)
CAPTION = Caption("position", ("fox", "apple"), ("small", "large"), "left of", ("blue",))
READING = Reading((APPLE, FOX), ("blue", "blue"))


def test_drawn_scenes_show_their_captions() -> None:
    rng = np.random.default_rng(0)
    for _, caption in draw_captions(50, 1):
        scene = draw(caption, rng)
        assert shows(Reading(scene.objects, scene.background), caption), caption


@pytest.mark.parametrize(
    "reading",
    [
        replace(READING, objects=(FOX,)),
        replace(READING, objects=(APPLE, FOX, FOX)),
        replace(READING, objects=(APPLE, replace(FOX, name="car"))),
        replace(READING, objects=(APPLE, replace(FOX, x=50.0))),
        replace(READING, objects=(APPLE, replace(FOX, x=40.0, y=5.0))),
        replace(READING, objects=(APPLE, replace(FOX, side=28))),
        replace(READING, objects=(replace(APPLE, side=20), FOX)),
        replace(READING, background=("blue", "green")),
    ],
    ids=["missing", "one more", "other object", "right of", "above", "not small", "not large", "background"],
)
def test_picture_that_differs_from_its_caption_is_wrong(reading: Reading) -> None:
    assert shows(READING, CAPTION)
    assert not shows(reading, CAPTION)


class _Told(nn.Module):
    """Returns the maps of given objects, as a reader that makes no mistakes would."""

    def __init__(self, objects: tuple[Placed, ...]) -> None:
        super().__init__()
        cells = SIDE // CELL
        self.centres = torch.full((1, len(NAMES), cells, cells), -9.0)
        self.sides = torch.zeros(1, cells, cells)
        for placed in objects:
            row, column = int(placed.y / CELL), int(placed.x / CELL)
            self.centres[0, NAMES.index(placed.name), row, column] = 3.0
            self.sides[0, row, column] = placed.side / SIDE

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        colours = torch.zeros(1, 2, len(COLOURS))
        colours[0, 0, 2] = colours[0, 1, 5] = 1.0
        return self.centres, self.sides, colours, torch.zeros(1, 4)


def test_read_finds_objects_sides_and_colours() -> None:
    doubtful = Placed("frog", FOX.x + CELL, FOX.y, 20)  # next to the fox, so one object
    model = _Told((FOX, APPLE, doubtful))
    model.centres[0, NAMES.index("frog")] -= 1
    (reading,), features = read(model, np.zeros((1, SIDE, SIDE, 3), np.uint8))  # type: ignore[arg-type]
    assert {(one.name, one.side) for one in reading.objects} == {("fox", 20), ("apple", 32)}
    for found, placed in zip(sorted(reading.objects, key=lambda one: one.x), (FOX, APPLE), strict=True):
        assert max(abs(found.x - placed.x), abs(found.y - placed.y)) <= CELL / 2
    assert reading.background == (list(COLOURS)[2], list(COLOURS)[5])
    assert features.shape == (1, 4)


def test_figures_of_drawings_are_those_of_real_pictures() -> None:
    torch.manual_seed(0)
    captions = draw_captions(2, 7)
    judge = Judge.of(Reader().eval(), captions, drawings=8)
    drawn = judge.figures(real_pictures(captions, 4, 9), 4)
    grey = judge.figures(np.full((4 * len(captions), SIDE, SIDE, 3), 128, np.uint8), 4)
    assert drawn.correct.keys() == CATEGORIES.keys()
    assert drawn.frechet < grey.frechet
    assert grey.spread == 0.0 < drawn.spread
    assert 0 < drawn.nearest < grey.nearest


def test_summary_of_figures_is_the_mean_over_categories() -> None:
    correct = {name: index / 10 for index, name in enumerate(CATEGORIES)}
    figures = Figures(correct, 1.0, 2.0, 3.0)
    assert figures.all == pytest.approx(0.45)
    assert figures.seen == pytest.approx(np.mean([correct[name] for name in SEEN]))
    assert figures.unseen == pytest.approx(np.mean([correct[f"{name}, unseen"] for name in SEEN]))


@pytest.mark.parametrize("budget", [FULL, QUICK])
def test_grid_of_a_budget_has_every_mode_and_distinct_names(budget: Budget) -> None:
    assert {search.guidance for search in budget.searches} == set(LABELS)
    assert len({setting.name for setting in budget.grid}) == len(budget.grid)


def test_winners_have_the_best_accuracy_of_their_kind_and_the_least_distance_of_their_mode() -> None:
    """Their order is that of the grid. The values are accuracy and distance."""
    table = {
        Setting("none"): (0.1, 9.0),
        Setting("none", 1.0, 0.5): (0.3, 9.0),
        Setting("cfg", 1.5): (0.2, 1.0),
        Setting("cfg", 2.0): (0.3, 2.0),
        Setting("cfg", 3.0): (0.4, 3.0),
        Setting("cfg", 2.0, 0.5): (0.2, 4.0),
        Setting("sg", 2.0, 0.0, 0.5): (0.2, 1.0),
        Setting("sg", 2.0, 0.5, 0.9): (0.1, 2.0),
        Setting("autoguidance", 2.0, 0.0, 0.0): (0.5, 1.0),
        Setting("autoguidance", 2.0, 0.0, 0.5): (0.1, 1.0),
    }
    lost = {Setting("cfg", 2.0), Setting("sg", 2.0, 0.5, 0.9)}
    grid, values = tuple(table), table.values()
    rows = [
        Row("", None, None, (), (Figures(dict.fromkeys(CATEGORIES, share), distance, 0.0, 0.0),))
        for share, distance in values
    ]
    assert winners(rows, grid) == tuple(setting for setting in grid if setting not in lost)
