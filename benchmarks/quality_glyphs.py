"""Measure how each guidance mode changes the samples of the reference model `glyphs`.

    python -m benchmarks.quality_glyphs --output benchmarks/results --work runs/quality_glyphs

The modes are compared with each other and with unguided sampling. First, a search on a small budget
tries scales and sparsities. Its winners are then measured on the full budget with seeds that the
search has not used. Each mode runs on a bundle that was built for it. The classifier and all
samples are kept in the work folder, so an interrupted run can be resumed.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.glyph_classifier import FEATURES
from benchmarks.glyph_judge import (
    MEASURE_SEED,
    SEARCH_SEED,
    ClassifierFacts,
    Figures,
    Judge,
    cached_classifier,
    held_out_gaussian,
    real_images,
)
from benchmarks.glyph_report import COLUMNS, Report, Row, sheet, to_json, to_markdown
from benchmarks.guidance_grid import Search, Setting, shown, step_gmac, timed
from benchmarks.machine import machine
from examples.glyphs import CLASS_NAMES, HELD_OUT_FONTS, TRAINING_FONTS
from sg_runtime import Pipeline
from sg_runtime.files import replacing
from sg_runtime.images import save_png
from sg_runtime.manifest import GuidanceMode

BATCH = 124
"""Number of images in one engine run: two of each character."""

SEARCH_BLOCK = 0
"""Block of image seeds that the search uses. The measurement uses blocks 1 and up.

The seed of an image is block * 2**32 + index.
"""

REAL_SEED = 1000
"""Base seed of the real images that replace samples in the rows of real images.

The seed is this number plus the block.
"""

CRITERION = (
    "Accuracy alone would choose the most typical image of each character over and over. The distance to the "
    "training fonts would reward copies of the training images. The held-out fonts, new to the model, punish both."
)


COSINE = (0.0, 0.2, 0.4, 0.6)
"""Levels of the paper's schedule here. The schedule goes from one end to the other."""

WEAK_CHECKPOINT = "glyphs-early"


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of a run.

    steps: number of Euler steps.
    blocks: blocks of image seeds of the measurement, one per set of samples.
    measured: images per character in each set of the measurement.
    searched: images per character in the search.
    searches: grid of each mode.
    classifier_variants: distortions of each character and font that the classifier is trained on.
    classifier_epochs: epochs of the classifier's training.
    reference_variants: distortions of each character and font in the reference images.
    """

    steps: int
    blocks: tuple[int, ...]
    measured: int
    searched: int
    searches: tuple[Search, ...]
    classifier_variants: int
    classifier_epochs: int
    reference_variants: int

    @property
    def grid(self) -> tuple[Setting, ...]:
        """Settings of the search."""
        return tuple(setting for search in self.searches for setting in search.settings)


FULL = Budget(
    steps=20,
    blocks=(1, 2, 3),
    measured=34,
    searched=6,
    searches=(
        Search("cfg", (1.1, 1.25, 1.5, 2.0, 3.0, 4.0)),
        # The paper advises a clear gap between the two sparsities.
        Search("sg", (1.25, 1.5, 2.0, 3.0, 4.0), ((0.0, 0.5), (0.0, 0.75), (0.0, 0.9), (0.25, 0.75), (0.25, 0.9))),
        Search("cfg+sg", (1.5, 2.0), ((0.0, 0.5), (0.0, 0.75), (0.25, 0.75))),
        # The constant sparsities are also levels of the cosine. Other sparsities would add levels
        # to the bundle, and the cosine would use them, too.
        Search("autoguidance", (1.5, 2.0, 3.0), ((0.0, 0.0), (0.0, 0.6), (COSINE, COSINE[::-1]))),
    ),
    classifier_variants=64,
    classifier_epochs=5,
    reference_variants=64,  # makes the images of the training fonts equal to the model's training set
)
"""Budget of the published figures.

It has 2,108 images for each setting and seed, and takes forty minutes to an hour on two cores.
"""

QUICK = Budget(
    steps=2,
    blocks=(1, 2),
    measured=2,
    searched=2,
    searches=(
        Search("cfg", (1.5,)),
        Search("sg", (1.5,), ((0.0, 0.75),)),
        Search("cfg+sg", (1.5,), ((0.0, 0.75),)),
        Search("autoguidance", (1.5,), (((0.0, 0.6), (0.6, 0.0)),)),
    ),
    classifier_variants=4,
    classifier_epochs=2,
    reference_variants=4,
)
"""Budget to check that all parts work. The figures mean nothing.

It takes a few minutes, mostly for compilation.
"""


def generate(
    pipe: Pipeline, setting: Setting, classes: Sequence[int], seeds: Sequence[int], steps: int
) -> NDArray[np.uint8]:
    """Sample one image per class and seed with Euler steps: (B, 16, 16), ink 255 on 0."""
    images: NDArray[np.uint8] = pipe(classes, seeds, steps=steps, sampler="euler", guidance=setting.plan(pipe))
    return images[..., 0]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Sampler that keeps its samples in `folder`.

    It samples from the bundle of a setting's mode, once per bundle, setting, seeds and steps.
    """

    pipes: Mapping[GuidanceMode, Pipeline]
    folder: Path
    steps: int

    def samples(self, setting: Setting, per_class: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images (N, 16, 16) of all characters in turn, and their classes (N,).

        They are loaded from `folder` if they were sampled before.
        """
        count = per_class * len(CLASS_NAMES)
        classes = np.arange(count, dtype=np.int64) % len(CLASS_NAMES)
        path = self.folder / f"{self._key(setting, count, block)}.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["images"], classes
        seeds = [(block << 32) + index for index in range(count)]
        images = generate(self.pipes[setting.guidance], setting, classes.tolist(), seeds, self.steps)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=images)
        return images, classes

    def _key(self, setting: Setting, count: int, block: int) -> str:
        rates = "-".join(shown(rate).replace("→", "to") for rate in (setting.strong_sparsity, setting.sparsity or 0.0))
        pipe = self.pipes[setting.guidance]
        files = sorted((name, facts.sha256) for name, facts in pipe.bundle.manifest.files.items())
        made_by = hashlib.sha256(f"{files} {pipe.batch} {version('sg-export')}".encode()).hexdigest()[:12]
        return f"{setting.guidance}-{setting.scale:g}-{rates}-n{count}-block{block}-steps{self.steps}-{made_by}"

    def row(self, setting: Setting, per_class: int, blocks: Sequence[int], judge: Judge) -> Row:
        """Sample a setting with the seeds of each block and measure each set of samples."""
        figures = []
        for block in blocks:
            figures.append(judge.figures(*self.samples(setting, per_class, block)))
            print(
                f"{setting.name:38} block {block}  accuracy {figures[-1].accuracy:.4f}  "
                f"Fréchet {figures[-1].frechet_training:.2f} training, {figures[-1].frechet_held_out:.2f} held out",
                flush=True,
            )
        cost = step_gmac(self.pipes[setting.guidance], setting, self.steps)
        return Row(setting.name, asdict(setting), cost, tuple(figures))


def real_rows(per_class: int, blocks: Sequence[int], judge: Judge) -> tuple[Row, ...]:
    """Measure real images instead of samples, with the same number of images in each set."""
    return tuple(
        Row(
            f"real: {name}",
            None,
            None,
            tuple(judge.figures(*real_images(fonts, per_class, REAL_SEED + block)) for block in blocks),
        )
        for name, fonts in (("training fonts, fresh", TRAINING_FONTS), ("held-out fonts", HELD_OUT_FONTS))
    )


def best(rows: Sequence[Row], grid: Sequence[Setting], guidance: GuidanceMode) -> Setting:
    """Return the setting of one mode with the smallest Fréchet distance to the held-out fonts."""
    candidates = [(row.figures[0].frechet_held_out, setting) for row, setting in zip(rows, grid, strict=True)]
    return min((pair for pair in candidates if pair[1].guidance == guidance), key=lambda pair: pair[0])[1]


def kept_rows(path: Path, checkpoint: str, reader: ClassifierFacts, budget: Budget) -> dict[tuple[str, str], Row]:
    """Return the rows of an earlier result that this run can keep, by (table, setting).

    The earlier run must have the same checkpoint, seeds, number of images, steps and classifier;
    otherwise no row is kept.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_bytes())
    source = content["checkpoint"] if "checkpoint" in content else content["checkpoints"]["main"]
    same = [(source["sha256"], checkpoint), (content["read_held_out"], json.loads(json.dumps(asdict(reader))))]
    same += [(content["protocol"][name], getattr(budget, name)) for name in ("steps", "measured", "searched")]
    same += [(content["protocol"]["blocks"], list(budget.blocks))]
    if any(earlier != now for earlier, now in same):
        return {}
    return {
        (table, row["name"]): Row(
            row["name"],
            row["parameters"],
            row["gmac_per_step"],
            tuple(Figures(**figures) for figures in row["figures"]),
            kept=True,
        )
        for table in ("measured", "searched")
        for row in content[table]
    }


def run(budget: Budget, work: Path, output: Path, keep: bool) -> None:
    """Compile, search, measure, and write the three result files to `output`."""
    here = machine("numpy", "torch", "onnxruntime", "pillow", "matplotlib")
    seconds: dict[str, float] = {}
    output.mkdir(parents=True, exist_ok=True)
    samples_folder = work / "samples"
    samples_folder.mkdir(parents=True, exist_ok=True)
    with timed("compilation", seconds):
        pipes = {
            search.guidance: Pipeline.load(compiled(search, work / "bundles" / search.guidance), batch=BATCH)
            for search in budget.searches
        }
        pipes["none"] = pipes["cfg"]  # every bundle has the same dense graph
    with timed("classifier", seconds):
        classifier = cached_classifier(work, budget.classifier_variants, budget.classifier_epochs)
        variants = max(1, budget.reference_variants // 4)
        read_training = ClassifierFacts.of(classifier, TRAINING_FONTS, variants)
        read_held_out = ClassifierFacts.of(classifier, HELD_OUT_FONTS, 3 * variants)  # one third of the number of fonts
    with timed("references", seconds):
        judge = Judge.of(classifier, budget.reference_variants, MEASURE_SEED)
        scout = replace(judge, held_out=held_out_gaussian(classifier, budget.reference_variants, SEARCH_SEED))
    sampler = Sampler(pipes, samples_folder, budget.steps)
    manifest, results = pipes["autoguidance"].bundle.manifest, output / "quality_glyphs.json"
    kept = kept_rows(results, manifest.source.sha256, read_held_out, budget) if keep else {}
    with timed("search", seconds):
        searched = tuple(
            kept.get(("searched", setting.name)) or sampler.row(setting, budget.searched, [SEARCH_BLOCK], scout)
            for setting in budget.grid
        )
        searched_real = real_rows(budget.searched, [SEARCH_BLOCK], scout)
    winners = [best(searched, budget.grid, search.guidance) for search in budget.searches]
    chosen = [Setting("none"), *winners]
    with timed("measurement", seconds):
        measured = tuple(
            kept.get(("measured", setting.name)) or sampler.row(setting, budget.measured, budget.blocks, judge)
            for setting in chosen
        )
        real = real_rows(budget.measured, budget.blocks, judge)

    report = Report(
        machine=here,
        checkpoints={
            branch: {"name": source.name, "sha256": source.sha256, "weights": source.weights}
            for branch, source in (("main", manifest.source), ("weak", manifest.weak_source))
            if source is not None
        },
        compiled_by=manifest.created_by,
        protocol={
            **asdict(budget),
            "images": budget.measured * len(CLASS_NAMES),
            "search_images": budget.searched * len(CLASS_NAMES),
            "seeds": len(budget.blocks),
            "features": FEATURES,
            "criterion": CRITERION,
        },
        read_training=read_training,
        read_held_out=read_held_out,
        measured=measured,
        real=real,
        searched=searched,
        searched_real=searched_real,
        seconds=seconds,
    )
    _write(results, to_json(report))
    _write(output / "quality_glyphs.md", to_markdown(report))
    shown = {setting.label: sampler.samples(setting, 2, budget.blocks[0])[0][: 4 * COLUMNS] for setting in chosen}
    save_png(sheet(shown), output / "quality_glyphs.png")


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def compiled(search: Search, output: Path) -> Path:
    """Compile the reference model for the mode and the sparsities of a search.

    Returns the path of the bundle.
    """
    import sg_export

    options = sg_export.CompileOptions(
        output,
        sparsity=search.weak_levels,
        strong_sparsity=search.strong_levels,
        guidance=search.guidance,
        weak_checkpoint=WEAK_CHECKPOINT if search.guidance == "autoguidance" else None,
        force=True,
    )
    return sg_export.compile("glyphs", options).path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="output folder (default: benchmarks/results, or WORK with --quick)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quality_glyphs"), help="folder of classifier, bundles and samples"
    )
    parser.add_argument("--quick", action="store_true", help="use a tiny budget, only to check that all parts work")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep existing rows of the output folder if they have the same seeds and classifier",
    )
    options = parser.parse_args()
    budget, results = (QUICK, options.work) if options.quick else (FULL, Path("benchmarks/results"))
    run(budget, options.work, options.output or results, options.keep)


if __name__ == "__main__":
    main()
