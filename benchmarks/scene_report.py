"""Write the results of `quality_scenes` as JSON and as Markdown tables."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.glyph_report import mean_and_deviation
from benchmarks.scene_judge import CATEGORIES, Figures


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a setting, or drawn scenes.

    parameters: fields of the setting; None for drawn scenes. gmac_per_step: cost of a step; None
    for drawn scenes. seconds, figures: one entry per seed; seconds for one picture, with text
    encoder and decoder.
    """

    name: str
    parameters: Mapping[str, object] | None
    gmac_per_step: float | None
    seconds: tuple[float, ...]
    figures: tuple[Figures, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a run.

    measured: the settings that the search chose. searched: all settings of the search. The last
    two rows of both are of drawn scenes. hours: time of all sampling.
    """

    machine: Mapping[str, Any]
    checkpoints: Mapping[str, Mapping[str, str]]
    compiled_by: str
    protocol: Mapping[str, Any]
    measured: tuple[Row, ...]
    searched: tuple[Row, ...]
    hours: float


SUMMARY: Mapping[str, tuple[Callable[[Figures], float], int]] = {
    "all": (lambda one: 100 * one.all, 1),
    "composition": (lambda one: 100 * one.seen, 1),
    "unseen pairs": (lambda one: 100 * one.unseen, 1),
    "Fréchet": (lambda one: one.frechet, 3),
    "spread": (lambda one: one.spread, 1),
    "nearest": (lambda one: one.nearest, 2),
}
"""Columns of the first table: how to read them from figures, and their digits."""


def to_json(report: Report) -> str:
    """Return the report as JSON. Each row also has `mean` and `deviation` of the summary."""
    content = asdict(report)
    for table, rows in (("measured", report.measured), ("searched", report.searched)):
        for written, row in zip(content[table], rows, strict=True):
            values = {name: mean_and_deviation([get(one) for one in row.figures]) for name, (get, _) in SUMMARY.items()}
            written["mean"] = {name: mean for name, (mean, _) in values.items()}
            written["deviation"] = {name: deviation for name, (_, deviation) in values.items()}
    return json.dumps(content, indent=1) + "\n"


def to_markdown(report: Report) -> str:
    """Return the tables and an explanation of them as Markdown."""
    machine, protocol = report.machine, report.protocol
    main, weak = (f"{source['name']}, SHA-256 `{source['sha256']}`" for source in report.checkpoints.values())
    error = 50 / (protocol["searched"] * len(CATEGORIES)) ** 0.5
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"""# How guidance changes the pictures of `scenes`

Written by `python -m benchmarks.quality_scenes`. All figures are in `quality_scenes.json`.

* Checkpoint: {main}, compiled by {report.compiled_by}; weak branch of AutoGuidance: {weak}.
* Machine: {machine["processor"]}, {machine["cores"]} cores; {versions}.
* Sampling: {protocol["steps"]} Euler steps, {protocol["pictures"]} pictures for each setting and seed,
  {protocol["each"]} of each of {protocol["captions"]} captions in each of {len(CATEGORIES)} categories. Every
  setting has the same captions and seeds.
* Names: strong/weak sparsity γ and scale ω.

Figures are mean ± standard deviation over {len(protocol["blocks"])} sampling seeds of one trained model. All have
the same captions, so ± does not say how much other captions would change.

{_summary(report.measured)}

* **GMAC per step**: multiply-adds of the linear layers for one picture in one step, without attention
  and without what runs before the loop. **Pictures/s**: in batches of {protocol["batch"]}, with text encoder and
  decoder.
* **All**: share of pictures that show exactly what the caption says, the mean of the categories below.
  **Composition**: the mean of "two", "three" and "position"; **unseen pairs**: the same for pairs of
  objects that no training picture shows together.
* **Fréchet**: squared distance between Gaussians of the reader's 64 features, to
  {protocol["drawings"]} drawings of each of the same captions.
* **Spread**: root mean square difference between two pictures of one caption, in levels of 255.
* **Nearest**: mean distance to the nearest of 16,384 training scenes, both at 16×16 pixels.

By category, in %:

{_categories(report.measured)}

The reader was trained on drawn scenes alone. "Drawn scenes" are fresh ones and show its own errors.
Those that went through encoder and decoder show what the decoder costs any model of latents.

## The search

The search draws {protocol["searched"]} pictures of each category, with captions and seeds of its own. Of each
kind of guidance, dense or sparse, the setting with the best accuracy of all is measured above, and of
CFG and SG the one with the smallest Fréchet distance, too; they are bold. An accuracy of all has a
standard error of up to {error:.1f} points here, so the best of many candidates need not be the best one.
With so few pictures every distance is larger than above.

{_summary(report.searched, {row.name for row in report.measured if row.parameters is not None})}

All pictures took {report.hours:.1f} hours to sample.
"""


def _summary(rows: Sequence[Row], bold: Collection[str] = ()) -> str:
    lines = [f"| | GMAC per step | pictures/s | {' | '.join(SUMMARY)} |", f"|---|{'---:|' * (len(SUMMARY) + 2)}"]
    for row in rows:
        cells = [f"**{row.name}**" if row.name in bold else row.name]
        cells.append("–" if row.gmac_per_step is None else f"{row.gmac_per_step:.3f}")
        cells.append(_cell([1 / seconds for seconds in row.seconds], 1) if row.seconds else "–")
        cells += [_cell([get(one) for one in row.figures], digits) for get, digits in SUMMARY.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _categories(rows: Sequence[Row]) -> str:
    lines = [f"| | {' | '.join(CATEGORIES)} |", f"|---|{'---:|' * len(CATEGORIES)}"]
    for row in rows:
        cells = [_cell([100 * one.correct[name] for one in row.figures], 0) for name in CATEGORIES]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")
