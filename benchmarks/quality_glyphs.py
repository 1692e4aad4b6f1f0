"""What guidance does to the samples of the reference model `glyphs`: unguided, CFG and Sparse Guidance side by side.

    python -m benchmarks.quality_glyphs --output benchmarks/results --work runs/quality_glyphs

A search over scales and sparsities on a small budget comes first; its winners are measured in full on seeds that the
search has not seen. The classifier and all samples are kept in the work folder, so a run that was stopped goes on.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    Judge,
    cached_classifier,
    held_out_gaussian,
    real_images,
)
from benchmarks.glyph_report import COLUMNS, Report, Row, sheet, to_json, to_markdown
from benchmarks.machine import machine
from examples.glyphs import CLASS_NAMES, HELD_OUT_FONTS, TRAINING_FONTS
from sg_runtime import Pipeline
from sg_runtime.files import replacing
from sg_runtime.images import save_png
from sg_runtime.manifest import GuidanceMode

BATCH = 124
"""Images in one engine run: two of each character."""

SEARCH_BLOCK = 0
"""Block of image seeds that the search uses; measurement uses 1 and up. An image's seed is block * 2**32 + index."""

REAL_SEED = 1000
"""Plus the block: seed of the distortions that stand for samples in the rows of real images."""

CRITERION = (
    "Accuracy alone would choose the most typical image of each character over and over, and the distance to the "
    "training fonts would reward copies of the training images; the held-out fonts, new to the model, punish both."
)


@dataclass(frozen=True, slots=True)
class Setting:
    """How the samples of one row are made. Without guidance the scale is 1; `sparsity`, the weak branch's, is SG's."""

    guidance: GuidanceMode
    scale: float = 1.0
    strong_sparsity: float = 0.0
    sparsity: float | None = None

    @property
    def name(self) -> str:
        """For a table."""
        if self.guidance == "none":
            return "unguided"
        rates = "" if self.sparsity is None else f" {self.strong_sparsity:g}/{self.sparsity:g}"
        return f"{self.guidance.upper()}{rates}, ω = {self.scale:g}"


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of a run. Images are counted per character; pairs are (strong, weak) sparsities."""

    steps: int
    blocks: tuple[int, ...]
    measured: int
    searched: int
    cfg_scales: tuple[float, ...]
    sg_scales: tuple[float, ...]
    sg_pairs: tuple[tuple[float, float], ...]
    classifier_variants: int
    classifier_epochs: int
    reference_variants: int

    @property
    def grid(self) -> tuple[Setting, ...]:
        """All settings of the search."""
        cfg = [Setting("cfg", scale) for scale in self.cfg_scales]
        sg = [Setting("sg", scale, strong, weak) for strong, weak in self.sg_pairs for scale in self.sg_scales]
        return (*cfg, *sg)


FULL = Budget(
    steps=20,
    blocks=(1, 2, 3),
    measured=34,
    searched=6,
    cfg_scales=(1.1, 1.25, 1.5, 2.0, 3.0, 4.0),
    sg_scales=(1.25, 1.5, 2.0, 3.0, 4.0),
    # the paper advises a clear gap between the two sparsities
    sg_pairs=((0.0, 0.5), (0.0, 0.75), (0.0, 0.9), (0.25, 0.75), (0.25, 0.9)),
    classifier_variants=64,
    classifier_epochs=5,
    reference_variants=64,  # the training fonts' images are then the model's training set
)
"""2,108 images for each setting and seed: twenty minutes to half an hour on two cores."""

QUICK = Budget(
    steps=2,
    blocks=(1, 2),
    measured=2,
    searched=2,
    cfg_scales=(1.5,),
    sg_scales=(1.5,),
    sg_pairs=((0.0, 0.75),),
    classifier_variants=4,
    classifier_epochs=2,
    reference_variants=4,
)
"""Seconds, to see that all parts work; the figures mean nothing."""


def generate(
    pipe: Pipeline, setting: Setting, classes: Sequence[int], seeds: Sequence[int], steps: int
) -> NDArray[np.uint8]:
    """Sample one image per class and seed with Euler steps: (B, 16, 16), ink 255 on 0."""
    plan = pipe.guidance(
        setting.guidance,
        scale=setting.scale,
        strong_sparsity=setting.strong_sparsity,
        sparsity=setting.sparsity,
    )
    images: NDArray[np.uint8] = pipe(classes, seeds, steps=steps, sampler="euler", guidance=plan)
    return images[..., 0]


def step_gmac(pipe: Pipeline, setting: Setting) -> float:
    """Linear multiply-adds of one step for one image, in 1e9, as the manifest counts them for the graphs that run."""
    manifest = pipe.bundle.manifest
    plan = pipe.guidance(
        setting.guidance, strong_sparsity=setting.strong_sparsity, sparsity=setting.sparsity, scale=setting.scale
    )
    fused = manifest.graph("guided", plan.strong.keep, plan.weak.keep) if plan.mode == "sg" else None
    if fused is not None:
        return fused.cost.linear_macs / 1e9
    levels = [plan.strong] if plan.mode == "none" else [plan.strong, plan.weak]
    graphs = [manifest.graph("dense", level.keep) or manifest.graph("sparse", level.keep) for level in levels]
    return sum(graph.cost.linear_macs for graph in graphs if graph is not None) / 1e9


@dataclass(frozen=True, slots=True)
class Sampler:
    """Samples of settings from one bundle, kept in `folder`: made once per checkpoint, setting, seeds and steps."""

    pipe: Pipeline
    folder: Path
    steps: int

    def samples(
        self, setting: Setting, per_class: int, block: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], float]:
        """(N, 16, 16) images of all characters in turn, their classes (N,), and the seconds that one image took."""
        count = per_class * len(CLASS_NAMES)
        classes = np.arange(count, dtype=np.int64) % len(CLASS_NAMES)
        path = self.folder / f"{self._key(setting, count, block)}.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["images"], classes, float(kept["seconds_per_image"])
        labels = classes.tolist()
        seeds = [(block << 32) + index for index in range(count)]
        generate(self.pipe, setting, labels[:BATCH], seeds[:BATCH], steps=1)  # opens the sessions
        began = time.perf_counter()
        images = generate(self.pipe, setting, labels, seeds, self.steps)
        pace = (time.perf_counter() - began) / count
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=images, seconds_per_image=pace)
        return images, classes, pace

    def _key(self, setting: Setting, count: int, block: int) -> str:
        rates = f"{setting.strong_sparsity:g}-{setting.sparsity or 0:g}"
        files = sorted((name, facts.sha256) for name, facts in self.pipe.bundle.manifest.files.items())
        made_by = hashlib.sha256(f"{files} {self.pipe.batch} {version('sg-export')}".encode()).hexdigest()[:12]
        return f"{setting.guidance}-{setting.scale:g}-{rates}-n{count}-block{block}-steps{self.steps}-{made_by}"

    def row(self, setting: Setting, per_class: int, blocks: Sequence[int], judge: Judge) -> Row:
        """Sample a setting with the seeds of each block, and measure every set."""
        figures, paces = [], []
        for block in blocks:
            images, classes, pace = self.samples(setting, per_class, block)
            figures.append(judge.figures(images, classes))
            paces.append(pace)
            print(
                f"{setting.name:24} block {block}  {pace:.4f} s/image  accuracy {figures[-1].accuracy:.4f}  "
                f"Fréchet {figures[-1].frechet_training:.2f} training, {figures[-1].frechet_held_out:.2f} held out",
                flush=True,
            )
        return Row(setting.name, asdict(setting), step_gmac(self.pipe, setting), tuple(paces), tuple(figures))


def real_rows(per_class: int, blocks: Sequence[int], judge: Judge) -> tuple[Row, ...]:
    """Rows of real images in the place of samples, as many in each set."""
    return tuple(
        Row(
            f"real: {name}",
            None,
            None,
            None,
            tuple(judge.figures(*real_images(fonts, per_class, REAL_SEED + block)) for block in blocks),
        )
        for name, fonts in (("training fonts, fresh", TRAINING_FONTS), ("held-out fonts", HELD_OUT_FONTS))
    )


def best(rows: Sequence[Row], grid: Sequence[Setting], guidance: GuidanceMode) -> Setting:
    """The setting of one kind of guidance with the least Fréchet distance to the held-out fonts."""
    candidates = [(row.figures[0].frechet_held_out, setting) for row, setting in zip(rows, grid, strict=True)]
    return min((pair for pair in candidates if pair[1].guidance == guidance), key=lambda pair: pair[0])[1]


def run(pipe: Pipeline, budget: Budget, work: Path, output: Path) -> None:
    """Search, measure, and write the three results into `output`."""
    here = machine("numpy", "torch", "onnxruntime", "pillow", "matplotlib")
    seconds: dict[str, float] = {}
    output.mkdir(parents=True, exist_ok=True)
    samples_folder = work / "samples"
    samples_folder.mkdir(parents=True, exist_ok=True)
    with _timed("classifier", seconds):
        classifier = cached_classifier(work, budget.classifier_variants, budget.classifier_epochs)
        variants = max(1, budget.reference_variants // 4)
        read_training = ClassifierFacts.of(classifier, TRAINING_FONTS, variants)
        read_held_out = ClassifierFacts.of(classifier, HELD_OUT_FONTS, 3 * variants)  # a third as many fonts
    with _timed("references", seconds):
        judge = Judge.of(classifier, budget.reference_variants, MEASURE_SEED)
        scout = replace(judge, held_out=held_out_gaussian(classifier, budget.reference_variants, SEARCH_SEED))
    sampler = Sampler(pipe, samples_folder, budget.steps)
    with _timed("search", seconds):
        searched = tuple(sampler.row(setting, budget.searched, [SEARCH_BLOCK], scout) for setting in budget.grid)
        searched_real = real_rows(budget.searched, [SEARCH_BLOCK], scout)
    winners = [best(searched, budget.grid, guidance) for guidance in ("cfg", "sg")]
    chosen = [Setting("none"), *winners]
    with _timed("measurement", seconds):
        measured = tuple(sampler.row(setting, budget.measured, budget.blocks, judge) for setting in chosen)
        real = real_rows(budget.measured, budget.blocks, judge)

    manifest = pipe.bundle.manifest
    source = manifest.source
    report = Report(
        machine=here,
        checkpoint={
            "name": source.name,
            "sha256": source.sha256,
            "weights": source.weights,
            "compiled_by": manifest.created_by,
        },
        protocol={
            **asdict(budget),
            "images": budget.measured * len(CLASS_NAMES),
            "search_images": budget.searched * len(CLASS_NAMES),
            "seeds": len(budget.blocks),
            "batch": pipe.batch,
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
    _write(output / "quality_glyphs.json", to_json(report))
    _write(output / "quality_glyphs.md", to_markdown(report))
    labels = {"none": "unguided", "cfg": "CFG", "sg": "SG"}
    shown = {
        labels[setting.guidance]: sampler.samples(setting, budget.measured, budget.blocks[0])[0][: 4 * COLUMNS]
        for setting in chosen
    }
    save_png(sheet(shown), output / "quality_glyphs.png")


@contextmanager
def _timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - began, 1)
    print(f"{part}: {seconds[part]:.1f} s", flush=True)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def compiled(budget: Budget, output: Path) -> Path:
    """Compile the reference model with every sparsity of the budget; returns the bundle's folder."""
    import sg_export

    strong = tuple(dict.fromkeys(pair[0] for pair in budget.sg_pairs))
    weak = tuple(dict.fromkeys(pair[1] for pair in budget.sg_pairs))
    bundle = sg_export.compile(
        "glyphs", sg_export.CompileOptions(output=output, sparsity=weak, strong_sparsity=strong, force=True)
    )
    return bundle.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results; quick: WORK)")
    parser.add_argument("--work", type=Path, default=Path("runs/quality_glyphs"), help="folder of what is kept")
    parser.add_argument("--bundle", type=Path, help="a bundle with the sparsities of the search (default: compile one)")
    parser.add_argument("--quick", action="store_true", help="a tiny budget that only shows that all parts work")
    options = parser.parse_args()
    budget, results = (QUICK, options.work) if options.quick else (FULL, Path("benchmarks/results"))
    options.work.mkdir(parents=True, exist_ok=True)
    bundle = options.bundle or compiled(budget, options.work / "bundle")
    run(Pipeline.load(bundle, batch=BATCH), budget, options.work, options.output or results)


if __name__ == "__main__":
    main()
