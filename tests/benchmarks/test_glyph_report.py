"""The report that `glyph_report` writes, from invented figures."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.glyph_judge import ClassifierFacts, Figures
from benchmarks.glyph_report import GAP, Report, Row, mean_and_deviation, sheet, to_json, to_markdown


def row(name: str, *distances: float) -> Row:
    figures = tuple(Figures(0.5, 0.75, 1.0, distance, 60.0, 20.0, 0.0) for distance in distances)
    return Row(name, {"scale": 1.5, "sparsity": (0.6, 0.0)}, 0.125, figures)


def report() -> Report:
    read = ClassifierFacts(100, 0.99, 1.0, (("O", "0", 3),))
    return Report(
        machine={"processor": "a processor", "cores": 2, "versions": {"python": "3"}},
        checkpoints={
            "main": {"name": "late", "sha256": "aa", "weights": "ema"},
            "weak": {"name": "early", "sha256": "bb", "weights": "ema"},
        },
        compiled_by="sg-export",
        protocol={
            "steps": 20,
            "images": 62,
            "search_images": 62,
            "seeds": 2,
            "features": 64,
            "criterion": "Why.",
        },
        read_training=read,
        read_held_out=read,
        measured=(row("unguided", 1.0, 3.0), row("SG", 2.0, 2.0)),
        real=(Row("real", None, None, row("", 1.0, 1.0).figures),),
        searched=(row("SG", 2.5), row("SG other", 3.5)),
        searched_real=(),
        seconds={"search": 60.0},
    )


def test_mean_and_deviation_of_one_value_is_zero_apart() -> None:
    assert mean_and_deviation([3.0]) == (3.0, 0.0)
    assert mean_and_deviation([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))


def test_to_json_rows_gain_mean_and_deviation() -> None:
    content = json.loads(to_json(report()))
    unguided = content["measured"][0]
    assert unguided["mean"]["frechet_held_out"] == 2
    assert unguided["deviation"]["frechet_held_out"] == pytest.approx(2**0.5)
    assert unguided["parameters"]["sparsity"] == [0.6, 0]


def test_to_markdown_names_checkpoints_rows_and_the_chosen() -> None:
    text = to_markdown(report())
    assert "Checkpoint: late, SHA-256 `aa`, compiled by sg-export; weak branch of AutoGuidance: early" in text
    assert "| unguided | 0.125 | 50.00 ± 0.00 % | 75.00 ± 0.00 % | 1.000 ± 0.000 | 2.000 ± 1.414 |" in text
    assert "| real | – | 50.00" in text
    assert "| **SG** | 0.125 |" in text
    assert "| SG other | 0.125 |" in text


def test_to_markdown_marks_rows_of_an_earlier_run() -> None:
    given = report()
    kept = replace(given, measured=(replace(given.measured[0], kept=True), given.measured[1]))
    assert "| unguided † | 0.125 |" in to_markdown(kept)
    assert "unguided †" not in to_markdown(given)


def test_sheet_has_a_row_per_setting_in_every_band() -> None:
    images = np.full((6, 16, 16), 255, dtype=np.uint8)
    page = sheet({"one": images, "two\nlines": images // 2}, columns=3, zoom=2)
    size = 32 + GAP
    assert page.shape[0] == 2 * (2 * size + 2 * GAP) - 3 * GAP
    assert page.shape[2] == 1
    left = page.shape[1] - 3 * size + GAP
    for top, value in ((0, 255), (size, 127), (2 * size + 2 * GAP, 255), (3 * size + 2 * GAP, 127)):
        for column in range(3):
            tile = page[top : top + 32, left + column * size : left + column * size + 32]
            assert (tile == value).all()
    assert (page[:, :left] == 255).any()  # the labels
