"""Measure how each guidance mode changes the pictures of the reference model `scenes`.

    python -m benchmarks.quality_scenes --output benchmarks/results --work runs/quality_scenes

A network that was trained on drawn scenes reads objects, places and background back from the
pictures. First, a search on a small budget tries scales and sparsities. Its winners are then
measured on the full budget, with captions and seeds that the search has not used. Each mode runs on
a bundle that was built for it.

The full run takes hours. The reader and the figures of every set of samples are kept in the output
folder, so a run that is interrupted goes on, also on another machine. The kept figures are those of
the same weights, captions, seeds and reader only.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sg_export
from benchmarks.guidance_grid import Search, Setting, step_gmac
from benchmarks.machine import machine
from benchmarks.scene_judge import Figures, Judge, Pictures, cached_reader, draw_captions, real_pictures
from benchmarks.scene_report import Report, Row, to_json, to_markdown
from examples.train_scenes import to_signed
from sg_export.reference import place_of
from sg_runtime import Pipeline
from sg_runtime.files import replacing
from sg_runtime.images import to_pixels
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
    captions=100,
    each=2,
    searched=32,
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
    """Samples settings and measures the samples. The figures of each set are kept.

    pipes: a pipeline of each mode. kept: JSON file of the figures. steps: Euler steps.
    """

    pipes: Mapping[GuidanceMode, Pipeline]
    kept: Path
    steps: int

    def rows(
        self, settings: Sequence[Setting], judge: Judge, each: int, blocks: Sequence[int]
    ) -> tuple[tuple[Row, ...], float]:
        """Return a row for each setting, with the seeds of each block, and the seconds of all.

        All settings have their first block before any has its second, so that a machine that
        becomes slower does not favour some.
        """
        sets = {(setting, block): self._set(setting, judge, each, block) for block in blocks for setting in settings}
        rows = []
        for setting in settings:
            seconds, figures = zip(*(sets[setting, block] for block in blocks), strict=True)
            cost = step_gmac(self.pipes[setting.guidance], setting, self.steps)
            rows.append(Row(setting.name, asdict(setting), cost, seconds, figures))
        return tuple(rows), sum(seconds for seconds, _ in sets.values()) * each * len(judge.captions)

    def _set(self, setting: Setting, judge: Judge, each: int, block: int) -> tuple[float, Figures]:
        """Return the seconds for a picture, and the figures of a set of samples."""
        kept = json.loads(self.kept.read_bytes()) if self.kept.exists() else {}
        if (key := self._key(setting, judge, each, block)) not in kept:
            pictures, seconds = self._samples(setting, [str(caption) for _, caption in judge.captions], each, block)
            figures = judge.figures(pictures, each)
            show(setting.name, block, figures)
            kept[key] = {"name": setting.name, "block": block, "seconds": seconds, "figures": asdict(figures)}
            with replacing(self.kept) as temporary:
                temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return kept[key]["seconds"], Figures(**kept[key]["figures"])

    def _samples(self, setting: Setting, captions: Sequence[str], each: int, block: int) -> tuple[Pictures, float]:
        """Return pictures (N, 64, 64, 3), `each` of every caption, and the seconds for one."""
        pipe, plan = self.pipes[setting.guidance], setting.plan(self.pipes[setting.guidance])
        prompts = [caption for caption in captions for _ in range(each)]
        seeds = [(block << 32) + index for index in range(len(prompts))]

        def run(part: slice, steps: int) -> Pictures:
            return pipe(prompts=prompts[part], seeds=seeds[part], steps=steps, sampler="euler", guidance=plan)

        run(slice(BATCH), 1)  # opens the graphs
        began = time.perf_counter()
        parts = [run(slice(at, at + BATCH), self.steps) for at in range(0, len(prompts), BATCH)]
        return np.concatenate(parts), (time.perf_counter() - began) / len(prompts)

    def _key(self, setting: Setting, judge: Judge, each: int, block: int) -> str:
        """Return a hash of all that a set of samples and its figures depend on."""
        files = {name: facts.sha256 for name, facts in self.pipes[setting.guidance].bundle.manifest.files.items()}
        versions = [version(name) for name in ("sg-export", "onnxruntime")]
        made_by = f"{setting} {judge.key} {each} {block} {self.steps} {BATCH} {sorted(files.items())} {versions}"
        return hashlib.sha256(made_by.encode()).hexdigest()[:16]


def show(name: str, block: int, figures: Figures) -> None:
    """Print the most important figures of a set."""
    print(
        f"{name:40} block {block}  all {figures.all:.3f}  composition {figures.seen:.3f} seen, "
        f"{figures.unseen:.3f} unseen  Fréchet {figures.frechet:.3f}  spread {figures.spread:.1f}",
        flush=True,
    )


def drawn_rows(judge: Judge, each: int, blocks: Sequence[int], autoencoder: Any) -> tuple[Row, Row]:
    """Measure drawings in place of samples: as they are, and encoded and decoded."""
    drawn = [real_pictures(judge.captions, each, 1000 + block) for block in blocks]
    sets = [[judge.figures(found, each) for found in (pictures, decoded(autoencoder, pictures))] for pictures in drawn]
    names = ("drawn scenes", "drawn scenes, encoded and decoded")
    first, second = (
        Row(name, None, None, (), tuple(own)) for name, own in zip(names, zip(*sets, strict=True), strict=True)
    )
    return first, second


def decoded(autoencoder: Any, pictures: Pictures) -> Pictures:
    """Return pictures after the encoder and the decoder of an autoencoder of diffusers."""
    with torch.inference_mode():
        found = [
            autoencoder.decode(autoencoder.encode(to_signed(pictures[at : at + 256])).latent_dist.mean).sample
            for at in range(0, len(pictures), 256)
        ]
    return to_pixels(torch.cat(found).numpy())


def kind_of(setting: Setting) -> tuple[object, ...]:
    """Return the kind of guidance of a setting: its mode, and which branches are sparse.

    SG has any sparsities.
    """
    if setting.guidance in ("sg", "cfg+sg"):
        return (setting.guidance,)
    if setting.guidance == "autoguidance":
        return (setting.guidance, setting.sparsity == setting.strong_sparsity)
    return (setting.guidance, setting.strong_sparsity)


def winners(rows: Sequence[Row], grid: Sequence[Setting]) -> tuple[Setting, ...]:
    """Return the setting of each kind with the best accuracy.

    Of the modes cfg and sg, also the one with the least Fréchet distance.
    """
    figures = {setting: row.figures[0] for row, setting in zip(rows, grid, strict=True)}
    chosen: dict[Setting, None] = {}
    for kind in dict.fromkeys(map(kind_of, grid)):
        own = [setting for setting in grid if kind_of(setting) == kind]
        chosen[max(own, key=lambda setting: figures[setting].all)] = None
    for mode in ("cfg", "sg"):
        own = [setting for setting in grid if setting.guidance == mode]
        chosen[min(own, key=lambda setting: figures[setting].frechet)] = None
    return tuple(setting for setting in grid if setting in chosen)


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
    from diffusers import AutoencoderKL

    here = machine("numpy", "torch", "onnxruntime", "pillow", "diffusers")
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    pipes = {
        search.guidance: Pipeline.load(compiled(search, checkpoint, weak, work / search.guidance))
        for search in budget.searches
    }
    reader = cached_reader(output, budget.reader_steps)
    autoencoder = AutoencoderKL.from_pretrained(place_of(checkpoint), subfolder="vae").float().eval()
    sampler = Sampler(pipes, output / "quality_scenes_sets.json", budget.steps)
    scout = Judge.of(reader, draw_captions(budget.searched, CAPTION_SEEDS["search"]), budget.drawings)
    searched, searching = sampler.rows(budget.grid, scout, 1, [SEARCH_BLOCK])
    judge = Judge.of(reader, draw_captions(budget.captions, CAPTION_SEEDS["measurement"]), budget.drawings)
    measured, measuring = sampler.rows(winners(searched, budget.grid), judge, budget.each, budget.blocks)
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
        measured=(*measured, *drawn_rows(judge, budget.each, budget.blocks, autoencoder)),
        searched=(*searched, *drawn_rows(scout, 1, [SEARCH_BLOCK], autoencoder)),
        hours=(searching + measuring) / 3600,
    )
    for name, text in (("json", to_json(report)), ("md", to_markdown(report))):
        with replacing(output / f"quality_scenes.{name}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="output folder (default: benchmarks/results, or WORK with --quick)")
    parser.add_argument("--work", type=Path, default=Path("runs/quality_scenes"), help="folder of the bundles")
    parser.add_argument("--checkpoint", default="scenes", help="folder of the model (default: the reference model)")
    parser.add_argument("--weak-checkpoint", default=WEAK_CHECKPOINT, help="file of the early transformer")
    parser.add_argument("--quick", action="store_true", help="use a tiny budget, only to check that all parts work")
    options = parser.parse_args()
    budget, results = (QUICK, options.work) if options.quick else (FULL, Path("benchmarks/results"))
    run(budget, options.checkpoint, options.weak_checkpoint, options.work, options.output or results)


if __name__ == "__main__":
    main()
