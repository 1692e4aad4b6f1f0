"""Data of `sg-export report` for one or more bundles of a model.

It covers costs, quality, layers, samples, sizes and times.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sg_calibration.feeds import identity_of, images_of
from sg_calibration.prompts import Prompts, read_prompts
from sg_calibration.settings import LEAST_STRATA
from sg_export.cost.step import PartCost, StepCost, part_costs, step_costs
from sg_export.parity.walk import by_pipeline, judge, run_distance, walk
from sg_export.progress import Report, silent
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Classes, Conditions, examples
from sg_runtime.errors import UsageError
from sg_runtime.guidance import built_guidances
from sg_runtime.images import grid
from sg_runtime.manifest import GuidanceMode, GuidancePlan, Labels, Manifest, StratumQuality
from sg_runtime.pipeline import Pipeline

SHOWN_IMAGES = 16
"""Number of images in a grid of samples."""
JUDGED = 4
"""Number of images on which quality is measured."""
TIMING_ROUNDS = 7
TIMING_PAUSE = 0.05
"""Seconds of pause before each timed run, as threads of the previous run still spin."""
MODES: tuple[GuidanceMode, ...] = ("none", "cfg", "sg")


@dataclass(frozen=True, slots=True)
class BundleReport:
    """Data of one bundle.

    name: name of the bundle's folder.
    manifest: manifest of the bundle.
    backend: name of the backend that ran it.
    bytes: total size of its files.
    seconds: median time of a default run of one image.
    samples: grid of samples for each guidance mode that the bundle was built for; empty if the
        bundle gives latents, or takes embeddings of prompts.
    quality: quality at each time compared with the first bundle; None for the first bundle.
    runs: largest relative L2 distance of complete runs to the first bundle's; None for the first
        bundle.
    """

    name: str
    manifest: Manifest
    backend: str
    bytes: int
    seconds: float
    samples: dict[str, NDArray[np.uint8]]
    quality: tuple[StratumQuality, ...] | None
    runs: float | None


@dataclass(frozen=True, slots=True)
class Page:
    """Data of all bundles. The other bundles are compared with the first.

    costs: costs of a step of the first bundle.
    parts: costs of its parts, if it has several.
    mask_noise: largest mask noise of the first bundle's runs, see `walk.Walk`.
    scale: guidance scale of the first bundle.
    images: number of images in a grid.
    prompts: their prompts, for a model with a text encoder.
    """

    bundles: tuple[BundleReport, ...]
    costs: tuple[StepCost, ...]
    parts: tuple[PartCost, ...]
    mask_noise: float
    scale: float
    images: int
    prompts: tuple[str, ...]


def collect(bundles: Sequence[str | Path], *, device: str = "auto", report: Report = silent) -> Page:
    """Run all bundles with the same classes, seeds and kept tokens, and return the page's data.

    Raises UsageError if the bundles are of different models, or if no guidance is built in all.
    """
    opened = [Bundle.open(path) for path in bundles]
    first = opened[0]
    for other in opened[1:]:
        if identity_of(other.manifest) != identity_of(first.manifest):
            raise UsageError(
                f"{other.path}: expected a bundle of the same checkpoint as {first.path}, found one of another model"
            )
    pipes = [Pipeline.load(bundle, device) for bundle in opened]
    prompts = None if first.manifest.text is None else Prompts(read_prompts(None), pipes[0].encode)
    conditions, seeds = images_of("gate", first.manifest.model, JUDGED, prompts=prompts)
    shared = _shared(opened)
    report("sampling guided runs of the first bundle", 0, 2 + len(pipes))
    walks = [walk(pipes[0], by_pipeline(pipes[0]), plan, conditions, seeds, LEAST_STRATA) for plan in shared]
    report("timing", 1, 2 + len(pipes))
    seconds = _seconds(pipes)
    found = []
    for number, (bundle, pipe) in enumerate(zip(opened, pipes, strict=True)):
        report(f"sampling {bundle.path}", 2 + number, 2 + len(pipes))
        found.append(
            BundleReport(
                bundle.path.name,
                bundle.manifest,
                pipe.backend.name,
                sum(file.size for file in bundle.manifest.files.values()),
                seconds[number],
                _samples(pipe),
                judge(pipe, walks) if number else None,
                run_distance(pipe, walks) if number else None,
            )
        )
    return Page(
        tuple(found),
        tuple(step_costs(first.manifest)),
        tuple(part_costs(first.manifest)) if first.manifest.parts else (),
        max(own.mask_noise for own in walks),
        first.manifest.guidance.scale,
        SHOWN_IMAGES,
        () if prompts is None else prompts.texts[:SHOWN_IMAGES],
    )


def _shared(bundles: Sequence[Bundle]) -> list[GuidancePlan]:
    """Return the guidances that all bundles have graphs for. Raises UsageError if none."""
    first, *others = [built_guidances(bundle.manifest) for bundle in bundles]
    keys = [{(plan.mode, plan.strong, plan.weak) for plan in plans} for plans in others]
    shared = [plan for plan in first if all((plan.mode, plan.strong, plan.weak) in known for known in keys)]
    if not shared:
        raise UsageError(
            f"{bundles[0].path}: expected a guidance that all bundles are built for, found none: build them with the "
            f"same guidance and sparsities"
        )
    return shared


def _seconds(pipes: Sequence[Pipeline]) -> list[float]:
    """Return the median time of a default run of one image for each pipeline.

    The pipelines run in turn, round by round.
    """
    for pipe in pipes:
        pipe.warmup()
    rounds = []
    for _ in range(TIMING_ROUNDS):
        times = []
        for pipe in pipes:
            time.sleep(TIMING_PAUSE)
            began = time.perf_counter()
            pipe.sample(examples(pipe.bundle.manifest.model, 1), [0])
            times.append(time.perf_counter() - began)
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _samples(pipe: Pipeline) -> dict[str, NDArray[np.uint8]]:
    """Return a grid of samples for each guidance mode, at the same classes or prompts and seeds.

    Modes that the bundle was not built for are left out.
    """
    model = pipe.bundle.manifest.model
    given: Classes | Conditions
    if not pipe.gives_images:
        return {}
    if isinstance(model.conditions, Labels):
        count = model.conditions.count
        given = [image * max(count // SHOWN_IMAGES, 1) % count for image in range(SHOWN_IMAGES)]
    elif pipe.bundle.manifest.text is not None:
        given = pipe.from_text(read_prompts(None)[:SHOWN_IMAGES], "")
    else:
        return {}
    found: dict[str, NDArray[np.uint8]] = {}
    for mode in MODES:
        try:
            plan = pipe.guidance(mode)
            x = pipe.sample(given, range(SHOWN_IMAGES), guidance=plan)
        except UsageError:  # the bundle was not built for this mode
            continue
        images = pipe.decode(x)
        found[mode] = grid(images, columns=4, zoom=max(1, 64 // images.shape[1]))
    return found
