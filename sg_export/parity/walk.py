"""Distance of a bundle's predictions to a reference, at every time of real guided runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sg_export.parity.distances import cosine_similarity, distance
from sg_runtime.arrays import Array
from sg_runtime.conditions import Conditions
from sg_runtime.errors import NonFiniteError
from sg_runtime.guidance import guide
from sg_runtime.manifest import GuidancePlan, SamplerName, StratumQuality
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.prepared import PreparedRun
from sg_runtime.sampling import integrate, trajectory

BranchPredictor = Callable[[Array, PreparedRun, int], tuple[Array, Array]]
"""Function (x, plan, evaluation) → (strong prediction, weak prediction).

If only the strong branch runs at that evaluation, both are the strong prediction.
"""

OTHER_SUBSETS = 1 << 20
"""Offset of a run's step counters with which other kept tokens are drawn."""


@dataclass(frozen=True, slots=True)
class Walk:
    """A guided Euler run of the reference, with its predictions at every evaluation.

    guidance: guidance of the run.
    conditions: conditions of the B images.
    seeds: seed of each image.
    times: time (t or sigma) of each of the E evaluations.
    states: state at each evaluation, (E, B, C, H, W) float32.
    strong: predictions of the strong branch at these states, of the same shape.
    weak: predictions of the weak branch at these states, of the same shape.
    samples: final state of the run, (B, C, H, W) float32.
    mask_noise: relative L2 distance between this run and one with the same seeds and other kept
        tokens; 0 without sparsity, or if it was not measured.
    """

    guidance: GuidancePlan
    conditions: Conditions
    seeds: tuple[int, ...]
    times: tuple[float, ...]
    states: Array
    strong: Array
    weak: Array
    samples: Array
    mask_noise: float


def by_pipeline(pipe: Pipeline) -> BranchPredictor:
    """Return a predictor of both branches by a bundle.

    The guided prediction is the strong branch at scale 1 and the weak branch at scale 0.
    """

    def branches(x: Array, plan: PreparedRun, index: int) -> tuple[Array, Array]:
        ones, zeros = (replace(plan, scales=(scale,) * len(plan.scales)) for scale in (1.0, 0.0))
        strong = pipe.guided(x, ones, index)
        alone = len(plan.active(index)) == 1
        return strong, strong if alone else pipe.guided(x, zeros, index)

    return branches


def walk(
    pipe: Pipeline,
    branches: BranchPredictor,
    guidance: GuidancePlan,
    conditions: Conditions,
    seeds: Sequence[int],
    steps: int,
    *,
    noise: bool = True,
) -> Walk:
    """Sample a guided Euler run with the predictions of `branches`.

    pipe: pipeline that draws the noise and the kept tokens. noise: also measure the mask noise,
    which takes a second run.
    """
    manifest = pipe.bundle.manifest
    path = trajectory(replace(manifest.sampling, steps=steps, sampler="euler"), manifest.model.prediction)
    run = path.updates
    states: list[Array] = []
    found: list[tuple[Array, Array]] = []

    def run_with(shift: int) -> Array:
        counters = [(update.step + shift, update.evaluation) for update in run]
        plan = pipe.prepare([u.time for u in run], conditions, seeds, counters=counters, guidance=guidance)

        def advance(index: int, x: Array, r: Array) -> Array:
            pair = branches(x, plan, index)
            if not shift:
                states.append(x)
                found.append(pair)
            return run[index].next(x, guide(*pair, guidance.scale), r)

        return integrate(run, advance, np.float32(path.start) * pipe.initial_noise(seeds))

    samples = run_with(0)
    sparse = max(guidance.strong.sparsity, guidance.weak.sparsity) > 0
    other = run_with(OTHER_SUBSETS) if noise and sparse else samples
    return Walk(
        guidance,
        conditions,
        tuple(seeds),
        tuple(update.time for update in run),
        np.stack(states),
        np.stack([strong for strong, _ in found]),
        np.stack([weak for _, weak in found]),
        samples,
        distance(other, samples),
    )


def judge(pipe: Pipeline, walks: Sequence[Walk], strata: Sequence[int] | None = None) -> tuple[StratumQuality, ...]:
    """Compare the pipeline's predictions with those of the walks; return the worst of each time.

    strata: indices of the times to compare; None for all.
    """
    worst: dict[float, StratumQuality] = {}
    for own in walks:
        plan = pipe.prepare(own.times, own.conditions, own.seeds, guidance=own.guidance)
        branches = by_pipeline(pipe)
        for index in range(len(own.times)) if strata is None else strata:
            strong, weak = branches(own.states[index], plan, index)
            scale = own.guidance.scale
            wanted = guide(own.strong[index], own.weak[index], scale)
            found = StratumQuality(
                own.times[index],
                cosine_similarity(strong, own.strong[index]),
                cosine_similarity(weak, own.weak[index]),
                distance(guide(strong, weak, scale), wanted),
            )
            known = worst.get(found.time, found)
            worst[found.time] = StratumQuality(
                found.time,
                min(known.strong, found.strong),
                min(known.weak, found.weak),
                max(known.guided, found.guided),
            )
    return tuple(worst[time] for time in sorted(worst, reverse=True))


def run_distance(pipe: Pipeline, walks: Sequence[Walk]) -> float:
    """Return the largest relative L2 distance of complete runs to the walks' samples.

    Seeds and kept tokens are the same.
    """
    return max(
        distance(
            sampled(pipe, own.conditions, own.seeds, steps=len(own.times), sampler="euler", guidance=own.guidance),
            own.samples,
        )
        for own in walks
    )


def sampled(
    pipe: Pipeline,
    conditions: Conditions,
    seeds: Sequence[int],
    *,
    steps: int,
    sampler: SamplerName,
    guidance: GuidancePlan,
    fused: bool = True,
) -> Array:
    """Sample with the pipeline. If a sample is not finite, all samples are NaN."""
    try:
        return pipe.sample(conditions, seeds, steps=steps, sampler=sampler, guidance=guidance, fused=fused)
    except NonFiniteError:
        return np.full((len(conditions), *pipe.bundle.manifest.model.latent), np.nan, np.float32)
