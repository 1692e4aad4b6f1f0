"""Write the results of `quality_glyphs` as JSON, as Markdown tables and as a sheet of samples."""

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.glyph_judge import ClassifierFacts, Figures
from benchmarks.glyph_metrics import AMBIGUOUS_GROUPS
from examples.glyphs import HELD_OUT_FONTS, TRAINING_FONTS

COLUMNS = 31
"""Number of images in a row of the sheet. The 62 characters take two rows."""

GAP = 2
"""Pixels between two images of the sheet."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a setting, or real images.

    name: name in the table.
    parameters: fields of the setting; None for real images.
    gmac_per_step: cost of a step; None for real images.
    figures: one entry per seed.
    """

    name: str
    parameters: Mapping[str, object] | None
    gmac_per_step: float | None
    figures: tuple[Figures, ...]
    kept: bool = False
    """Whether the row is kept from an earlier run of the same protocol."""


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a run.

    machine: processor, cores, system and library versions.
    checkpoints: name, SHA-256 and weights of "main" and of "weak", AutoGuidance's weak model.
    compiled_by: name and version of the compiler.
    protocol: sizes of the run and the reason for its criterion.
    read_training: accuracy of the classifier on the training fonts.
    read_held_out: accuracy of the classifier on the held-out fonts.
    measured: rows of the settings that the search chose; figures for each seed.
    real: rows of real images next to `measured`; figures for each seed.
    searched: rows of all settings of the search; figures for one seed.
    searched_real: rows of real images next to `searched`; figures for one seed.
    seconds: time of each part of the run.
    """

    machine: Mapping[str, Any]
    checkpoints: Mapping[str, Mapping[str, str | None]]
    compiled_by: str
    protocol: Mapping[str, Any]
    read_training: ClassifierFacts
    read_held_out: ClassifierFacts
    measured: tuple[Row, ...]
    real: tuple[Row, ...]
    searched: tuple[Row, ...]
    searched_real: tuple[Row, ...]
    seconds: Mapping[str, float]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation. The deviation of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def to_json(report: Report) -> str:
    """Return the report as JSON. Each row also has the `mean` and `deviation` of its figures."""
    content = asdict(report)
    for table in ("measured", "real", "searched", "searched_real"):
        for row in content[table]:
            summary = {name: mean_and_deviation([one[name] for one in row["figures"]]) for name in row["figures"][0]}
            row["mean"] = {name: mean for name, (mean, _) in summary.items()}
            row["deviation"] = {name: deviation for name, (_, deviation) in summary.items()}
    return json.dumps(content, indent=1) + "\n"


def to_markdown(report: Report) -> str:
    """Return the tables and an explanation of them as Markdown."""
    machine, protocol = report.machine, report.protocol
    main, weak = (f"{source['name']}, SHA-256 `{source['sha256']}`" for source in report.checkpoints.values())
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items())
    return f"""# How guidance changes the samples of `glyphs`

Written by `python -m benchmarks.quality_glyphs`. All figures are in `quality_glyphs.json`. Samples
at equal seeds are in `quality_glyphs.png`.

* Checkpoint: {main}, compiled by {report.compiled_by}; weak branch of AutoGuidance: {weak}.
* Machine: {machine["processor"]}, {machine["cores"]} cores; {versions}.
* Sampling: {protocol["steps"]} Euler steps, {protocol["images"]} images for each setting and seed,
  all 62 characters in equal numbers. Every setting has the same image seeds. Every mode runs on a
  bundle that was built for it.
* Names: strong/weak sparsity and scale ω. 0→0.6 is a cosine schedule from the first step to the
  last; each step uses the nearest sparsity in the bundle.

Figures are mean ± standard deviation over {protocol["seeds"]} sampling seeds of one trained model.
The rows of real images have the same number of images and show the figures of a perfect model of
those fonts.

{_table(report.measured + report.real)}

* †: kept from an earlier run of this script with the same checkpoint, seeds and classifier, and the
  graphs of that run.
* **GMAC per step**: multiply-adds of the linear layers for one image in one step. It is counted from
  the graphs that ran and is the mean over the run. The conditioning runs once per class and step
  before the loop and is not included.
* **Accuracy**: share of images that the classifier reads as the requested character. **Merged**:
  accuracy if each of these groups is one class:
  {", ".join(f"`{group}`" for group in AMBIGUOUS_GROUPS)}.
* **Fréchet**: squared distance between the Gaussians of the classifier's {protocol["features"]}
  penultimate features (Heusel et al. 2017), to the model's training images and to distortions of the
  held-out fonts. Lower is better.
* **Spread**: root mean square difference between two images of the same character, in grey levels of
  255. Guidance that trades diversity for accuracy lowers it.
* **Nearest**: mean distance to the nearest training image, in root mean square grey levels. **Near
  copies**: share of images that are nearer to a training image than all but 1 % of fresh distortions
  of the training fonts are. The samples of a model that copies are nearer than fresh distortions, and
  more of them are near copies.

The classifier was trained only on distortions of the {len(TRAINING_FONTS)} training fonts. The
held-out fonts are {", ".join(HELD_OUT_FONTS)}.
{_reading("the training fonts", report.read_training)}
{_reading("the held-out fonts", report.read_held_out)}

## The search

The search draws {protocol["search_images"]} images for each setting. It uses image seeds, and
distortions of the held-out fonts, that the table above does not use. For each guidance mode it
chooses the setting with the smallest Fréchet distance to the held-out fonts, shown in bold.
{protocol["criterion"]}
With so few images every distance is larger than above. Compare only within this table and with its
rows of real images.

{_table(report.searched + report.searched_real, {row.name for row in report.measured})}

This run took {sum(report.seconds.values()) / 60:.0f} minutes ({parts}). Samples kept from an earlier
run take no time.
"""


def _reading(fonts: str, facts: ClassifierFacts) -> str:
    errors = ", ".join(f"`{meant}` as `{seen}` {count}" for meant, seen, count in facts.confusions[:6])
    return (
        f"On {facts.images} fresh distortions of {fonts} its accuracy is {100 * facts.accuracy:.2f} %, merged "
        f"{100 * facts.merged_accuracy:.2f} %. Most common errors: {errors or 'none'}."
    )


_HEADINGS = {
    "accuracy": "accuracy",
    "merged_accuracy": "merged",
    "frechet_training": "Fréchet, training fonts",
    "frechet_held_out": "Fréchet, held-out fonts",
    "spread": "spread",
    "nearest": "nearest",
    "near_copies": "near copies",
}
_SHARES = ("accuracy", "merged_accuracy", "near_copies")
_DIGITS = {"frechet_training": 3, "frechet_held_out": 3}


def _table(rows: Sequence[Row], bold: Collection[str] = ()) -> str:
    lines = [
        f"| | GMAC per step | {' | '.join(_HEADINGS.values())} |",
        f"|---|{'---:|' * (len(_HEADINGS) + 1)}",
    ]
    for row in rows:
        cells = [(f"**{row.name}**" if row.name in bold else row.name) + (" †" if row.kept else "")]
        cells.append("–" if row.gmac_per_step is None else f"{row.gmac_per_step:.3f}")
        for name in _HEADINGS:
            values = [getattr(one, name) for one in row.figures]
            if name in _SHARES:
                cells.append(f"{_cell([100 * value for value in values], 2)} %")
            else:
                cells.append(_cell(values, _DIGITS.get(name, 2)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def sheet(samples: Mapping[str, NDArray[np.uint8]], columns: int = COLUMNS, zoom: int = 2) -> NDArray[np.uint8]:
    """Draw samples at equal seeds, one row per setting: (H, W, 1).

    The rows of the same characters are next to each other. samples: label → images (N, 16, 16). N
    is a multiple of `columns`, and all labels have the same characters and seeds.
    """
    size = 16 * zoom + GAP
    font = ImageFont.load_default(size=10 + zoom)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    left = int(max(ruler.multiline_textbbox((0, 0), label, font=font)[2] for label in samples)) + 12
    bands = min(len(images) for images in samples.values()) // columns
    height = bands * (len(samples) * size + 2 * GAP) - 3 * GAP
    page = Image.new("L", (left + columns * size - GAP, height), 96)
    draw = ImageDraw.Draw(page)
    for band in range(bands):
        for line, (label, images) in enumerate(samples.items()):
            top = band * (len(samples) * size + 2 * GAP) + line * size
            draw.text((4, top + size // 2), label, fill=255, font=font, anchor="lm")
            for column, image in enumerate(images[band * columns : (band + 1) * columns]):
                tile = Image.fromarray(image).resize((16 * zoom, 16 * zoom), Image.Resampling.NEAREST)
                page.paste(tile, (left + column * size, top))
    return np.asarray(page)[..., None]
