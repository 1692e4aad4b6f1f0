"""Measure how each guidance mode changes the pictures of the reference model `scenes`.

    python -m benchmarks.quality_scenes --output benchmarks/results --work runs/quality_scenes

A network that was trained on drawn scenes reads objects, places and background back from the
pictures. First, a search on a small budget tries scales and sparsities. Its winners are then
measured on the full budget, with captions and seeds that the search has not used. Each mode runs on
a bundle that was built for it. The reader and all samples are kept in the work folder, so an
interrupted run can be resumed.
"""

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import sg_export
from benchmarks.guidance_grid import Search, Setting, step_gmac, timed
from benchmarks.machine import machine
from benchmarks.scene_judge import (
    CHECK_SEED,
    Figures,
    Judge,
    Pictures,
    cached_reader,
    draw_captions,
    real_pictures,
    shows,
)
from benchmarks.scene_reader import read
from benchmarks.scene_report import Report, Row, to_json, to_markdown
from sg_runtime import Pipeline
from sg_runtime.files import replacing
from sg_runtime.manifest import GuidanceMode

BATCH = 32
"""Number of pictures in one engine run."""

SEARCH_BLOCK = 0
"""Block of seeds that the search uses. The measurement uses blocks 1 and up.

The seed of a picture is block * 2**32 + index. The search has captions of its own, too.
"""

CAPTION_SEEDS = {"search": 201, "measurement": 202}

WEAK_CHECKPOINT = "examples/scenes-early.safetensors"


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of a run.

    steps: number of Euler steps.
    blocks: blocks of seeds of the measurement, one per set of samples.
    captions, each: captions of a category, and pictures of a caption, in a set of the measurement.
    searched: captions of a category in the search, with one picture each.
    searches: grid of each mode.
    reader_steps: steps of the reader's training, of 64 scenes.
    drawings: drawings of each caption that pictures are compared with.
    """

    steps: int
    blocks: tuple[int, ...]
    captions: int
    each: int
    searched: int
    searches: tuple[Search, ...]
    reader_steps: int
    drawings: int

    @property
    def grid(self) -> tuple[Setting, ...]:
        """Settings of the search."""
        return tuple(setting for search in self.searches for setting in search.settings)


FULL = Budget(
    steps=20,
    blocks=(1, 2, 3),
    captions=50,
    each=4,
    searched=30,
    searches=(
        Search("none", (1.0,), ((0.0, None), (0.5, None))),
        Search("cfg", (1.5, 2.0, 3.0, 4.5), ((0.0, None), (0.5, None))),
        Search("sg", (1.5, 2.0, 3.0), ((0.0, 0.5), (0.0, 0.75), (0.25, 0.75), (0.5, 0.75), (0.5, 0.9))),
        Search("cfg+sg", (1.5, 2.0, 3.0), ((0.0, 0.5), (0.25, 0.75), (0.5, 0.75))),
        Search("autoguidance", (1.5, 2.0, 3.0), ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5))),
    ),
    reader_steps=1200,
    drawings=20,
)
"""Budget of the published figures: 2,000 pictures for each setting and seed."""

QUICK = Budget(
    steps=2,
    blocks=(1, 2),
    captions=1,
    each=2,
    searched=2,
    searches=(
        Search("none", (1.0,), ((0.0, None),)),
        Search("cfg", (2.0,)),
        Search("sg", (2.0,), ((0.0, 0.5),)),
        Search("cfg+sg", (2.0,), ((0.0, 0.5),)),
        Search("autoguidance", (2.0,), ((0.0, 0.5),)),
    ),
    reader_steps=3,
    drawings=4,
)
"""Budget to check that all parts work. The figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Sampler that keeps its samples in `folder`, once per bundle, setting, captions and seeds."""

    pipes: Mapping[GuidanceMode, Pipeline]
    folder: Path
    steps: int

    def samples(self, setting: Setting, captions: Sequence[str], each: int, block: int) -> tuple[Pictures, float]:
        """Return pictures (N, 64, 64, 3), `each` of every caption, and the seconds for one."""
        path = self.folder / f"{self._key(setting, captions, each, block)}.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["pictures"], float(kept["seconds"])
        pipe = self.pipes[setting.guidance]
        prompts = [caption for caption in captions for _ in range(each)]
        seeds = [(block << 32) + index for index in range(len(prompts))]
        began, parts = time.perf_counter(), []
        for at in range(0, len(prompts), BATCH):
            part = slice(at, at + BATCH)
            parts.append(
                pipe(
                    prompts=prompts[part],
                    seeds=seeds[part],
                    steps=self.steps,
                    sampler="euler",
                    guidance=setting.plan(pipe),
                )
            )
        pictures, seconds = np.concatenate(parts), (time.perf_counter() - began) / len(prompts)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, pictures=pictures, seconds=seconds)
        return pictures, seconds

    def _key(self, setting: Setting, captions: Sequence[str], each: int, block: int) -> str:
        files = sorted(
            (name, facts.sha256) for name, facts in self.pipes[setting.guidance].bundle.manifest.files.items()
        )
        made_by = f"{setting} {list(captions)} {each} {block} {self.steps} {BATCH} {files} {version('sg-export')}"
        return f"{setting.guidance}-block{block}-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}"

    def row(self, setting: Setting, judge: Judge, each: int, blocks: Sequence[int]) -> Row:
        """Sample a setting with the seeds of each block and measure each set of samples."""
        figures, seconds = [], []
        for block in blocks:
            pictures, took = self.samples(setting, [str(caption) for _, caption in judge.captions], each, block)
            figures.append(judge.figures(pictures, each))
            seconds.append(took)
            show(setting.name, block, figures[-1])
        cost = step_gmac(self.pipes[setting.guidance], setting, self.steps)
        return Row(setting.name, asdict(setting), cost, tuple(seconds), tuple(figures))


def show(name: str, block: int, figures: Figures) -> None:
    """Print the most important figures of a set."""
    print(
        f"{name:40} block {block}  all {figures.all:.3f}  composition {figures.seen:.3f} seen, "
        f"{figures.unseen:.3f} unseen  Fréchet {figures.frechet:.3f}  spread {figures.spread:.1f}",
        flush=True,
    )


def real_row(judge: Judge, each: int, blocks: Sequence[int]) -> Row:
    """Measure drawings in place of samples."""
    sets = [judge.figures(real_pictures(judge.captions, each, 1000 + block), each) for block in blocks]
    return Row("drawn scenes", None, None, (), tuple(sets))


def winners(rows: Sequence[Row], grid: Sequence[Setting]) -> tuple[Setting, ...]:
    """Return the settings of each mode with the best accuracy, and with the least Fréchet distance.

    Unguided settings are all returned.
    """
    chosen: dict[Setting, None] = {}
    for mode in dict.fromkeys(setting.guidance for setting in grid):
        own = [(row.figures[0], setting) for row, setting in zip(rows, grid, strict=True) if setting.guidance == mode]
        if mode == "none":
            chosen |= dict.fromkeys(setting for _, setting in own)
            continue
        chosen[max(own, key=lambda pair: pair[0].all)[1]] = None
        chosen[min(own, key=lambda pair: pair[0].frechet)[1]] = None
    return tuple(chosen)


def compiled(search: Search, checkpoint: str, weak: str, output: Path) -> Path:
    """Compile the model for the mode and the sparsities of a search.

    Returns the path of the bundle.
    """
    options = sg_export.CompileOptions(
        output,
        sparsity=search.weak_levels,
        strong_sparsity=search.strong_levels,
        guidance=search.guidance,
        weak_checkpoint=weak if search.guidance == "autoguidance" else None,
        batch=BATCH,
        force=True,
    )
    return sg_export.compile(checkpoint, options).path


def run(budget: Budget, checkpoint: str, weak: str, work: Path, output: Path) -> None:
    """Compile, search, measure, and write the result files to `output`."""
    here = machine("numpy", "torch", "onnxruntime", "pillow", "diffusers")
    seconds: dict[str, float] = {}
    output.mkdir(parents=True, exist_ok=True)
    (work / "samples").mkdir(parents=True, exist_ok=True)
    with timed("compilation", seconds):
        pipes = {
            search.guidance: Pipeline.load(compiled(search, checkpoint, weak, work / "bundles" / search.guidance))
            for search in budget.searches
        }
    with timed("reader", seconds):
        reader = cached_reader(work, budget.reader_steps)
        reading = reader_facts(reader, budget.captions)
    sampler = Sampler(pipes, work / "samples", budget.steps)
    with timed("search", seconds):
        scout = Judge.of(reader, draw_captions(budget.searched, CAPTION_SEEDS["search"]), budget.drawings)
        searched = tuple(sampler.row(setting, scout, 1, [SEARCH_BLOCK]) for setting in budget.grid)
        searched_real = real_row(scout, 1, [SEARCH_BLOCK])
    with timed("measurement", seconds):
        judge = Judge.of(reader, draw_captions(budget.captions, CAPTION_SEEDS["measurement"]), budget.drawings)
        measured = tuple(
            sampler.row(setting, judge, budget.each, budget.blocks) for setting in winners(searched, budget.grid)
        )
        real = real_row(judge, budget.each, budget.blocks)
    manifest = pipes["autoguidance"].bundle.manifest
    report = Report(
        machine=here,
        checkpoints={
            branch: {"name": source.name, "sha256": source.sha256}
            for branch, source in (("main", manifest.source), ("weak", manifest.weak_source))
            if source is not None
        },
        compiled_by=manifest.created_by,
        protocol=asdict(budget) | {"batch": BATCH, "pictures": len(judge.captions) * budget.each},
        reading=reading,
        measured=(*measured, real),
        searched=(*searched, searched_real),
        seconds=seconds,
    )
    for name, text in (("json", to_json(report)), ("md", to_markdown(report))):
        with replacing(output / f"quality_scenes.{name}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def reader_facts(reader: Any, captions: int) -> Mapping[str, float]:
    """Return the reader's accuracy on fresh drawings, by category."""
    drawn = draw_captions(4 * captions, CHECK_SEED)
    readings, _ = read(reader, real_pictures(drawn, 1, CHECK_SEED))
    right: dict[str, list[bool]] = {}
    for reading, (name, caption) in zip(readings, drawn, strict=True):
        right.setdefault(name, []).append(shows(reading, caption))
    return {name: float(np.mean(shown)) for name, shown in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="output folder (default: benchmarks/results, or WORK with --quick)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quality_scenes"), help="folder of reader, bundles and samples"
    )
    parser.add_argument("--checkpoint", default="scenes", help="folder of the model (default: the reference model)")
    parser.add_argument("--weak-checkpoint", default=WEAK_CHECKPOINT, help="file of the early transformer")
    parser.add_argument("--quick", action="store_true", help="use a tiny budget, only to check that all parts work")
    options = parser.parse_args()
    budget, results = (QUICK, options.work) if options.quick else (FULL, Path("benchmarks/results"))
    run(budget, options.checkpoint, options.weak_checkpoint, options.work, options.output or results)


if __name__ == "__main__":
    main()
