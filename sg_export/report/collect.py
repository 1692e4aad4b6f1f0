"""What `sg-export report` shows of one or more bundles of a model: costs, quality, layers, samples, sizes, times."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sg_calibration.feeds import images_of
from sg_calibration.ranges import identity_of
from sg_calibration.settings import LEAST_STRATA
from sg_export.cost.step import StepCost, step_costs
from sg_export.parity.walk import by_pipeline, judge, run_distance, walk
from sg_export.progress import Report, silent
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.guidance import built_guidances
from sg_runtime.images import grid
from sg_runtime.manifest import GuidanceMode, GuidancePlan, Manifest, StratumQuality
from sg_runtime.pipeline import Pipeline

SHOWN_IMAGES = 16
JUDGED = 4
TIMING_ROUNDS = 7
TIMING_PAUSE = 0.05
"""Seconds before a run is timed: threads of the one before it still spin for a while."""
MODES: tuple[GuidanceMode, ...] = ("none", "cfg", "sg")


@dataclass(frozen=True, slots=True)
class BundleReport:
    """One bundle.

    seconds: of a default run of one image, the median. samples: grids by mode, those that it can do, for models of
    pixels. quality, runs: beside the first bundle, None of that itself.
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
    """All bundles, the first being what the others are compared with.

    costs: of a step of the first one. mask_noise: see `quality.Walk`.
    """

    bundles: tuple[BundleReport, ...]
    costs: tuple[StepCost, ...]
    mask_noise: float
    scale: float
    images: int


def collect(bundles: Sequence[str | Path], *, device: str = "auto", report: Report = silent) -> Page:
    """Run all bundles at the same classes, seeds and subsets. Raises UsageError for bundles of different models."""
    opened = [Bundle.open(path) for path in bundles]
    first = opened[0]
    for other in opened[1:]:
        if identity_of(other.manifest) != identity_of(first.manifest):
            raise UsageError(f"{other.path}: expected a bundle of the same checkpoint as {first.path}, found another's")
    pipes = [Pipeline.load(path, device, verify_hashes=False) for path in bundles]
    classes, seeds = images_of("gate", first.manifest.model, JUDGED)
    shared = _shared(opened)
    report("walking along the first bundle", 0, 2 + len(pipes))
    walks = [walk(pipes[0], by_pipeline(pipes[0]), plan, classes, seeds, LEAST_STRATA) for plan in shared]
    report("timing", 1, 2 + len(pipes))
    seconds = _seconds(pipes)
    found = []
    for number, (own, pipe) in enumerate(zip(opened, pipes, strict=True)):
        report(f"sampling {own.path}", 2 + number, 2 + len(pipes))
        found.append(
            BundleReport(
                own.path.name,
                own.manifest,
                pipe.backend.name,
                sum(file.size for file in own.manifest.files.values()),
                seconds[number],
                _samples(pipe),
                judge(pipe, walks) if number else None,
                run_distance(pipe, walks) if number else None,
            )
        )
    return Page(
        tuple(found),
        tuple(step_costs(first.manifest)),
        max(own.mask_noise for own in walks),
        first.manifest.guidance.scale,
        SHOWN_IMAGES,
    )


def _shared(bundles: Sequence[Bundle]) -> list[GuidancePlan]:
    """The guidances that all bundles have graphs for."""
    first, *others = [built_guidances(bundle.manifest) for bundle in bundles]
    keys = [{(plan.mode, plan.strong, plan.weak) for plan in plans} for plans in others]
    shared = [plan for plan in first if all((plan.mode, plan.strong, plan.weak) in known for known in keys)]
    if not shared:
        raise UsageError(f"{bundles[0].path}: expected bundles built for one guidance at least in common, found none")
    return shared


def _seconds(pipes: Sequence[Pipeline]) -> list[float]:
    """A default run of one image by each, in turn, round by round: the medians."""
    for pipe in pipes:
        pipe.warmup()
    rounds = []
    for _ in range(TIMING_ROUNDS):
        times = []
        for pipe in pipes:
            time.sleep(TIMING_PAUSE)
            began = time.perf_counter()
            pipe.sample([0], [0])
            times.append(time.perf_counter() - began)
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _samples(pipe: Pipeline) -> dict[str, NDArray[np.uint8]]:
    """Grids of the same classes and seeds, by mode, where the model is one of pixels."""
    model = pipe.bundle.manifest.model
    if model.space == "latent":
        return {}
    classes = [image * max(model.num_classes // SHOWN_IMAGES, 1) % model.num_classes for image in range(SHOWN_IMAGES)]
    found: dict[str, NDArray[np.uint8]] = {}
    for mode in MODES:
        try:
            plan = pipe.guidance(mode)
            x = pipe.sample(classes, range(SHOWN_IMAGES), guidance=plan)
        except UsageError:  # not built for it
            continue
        found[mode] = grid(pipe.decode(x), columns=4, zoom=max(1, 64 // model.latent[1]))
    return found
