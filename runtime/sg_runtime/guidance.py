"""The Sparse Guidance update, the choice of a guidance plan, and the guidance per evaluation."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sg_runtime.arrays import Array
from sg_runtime.build_command import model_command, number_text
from sg_runtime.errors import UsageError
from sg_runtime.manifest import MODES, GuidanceMode, GuidancePlan, Level, Manifest, NetworkName, SubsetRule
from sg_runtime.manifest.base import choice, number, pair
from sg_runtime.manifest.model import KEPT
from sg_runtime.sampling import Update

Ramp = float | tuple[float, float]
"""A constant value, or the values of the first and last step with a cosine between them."""


def guide(strong: Array, weak: Array, scale: float) -> Array:
    """Return weak + scale * (strong - weak).

    strong, weak: (B, C, H, W) float32 predictions of the low- and the high-sparsity branch.
    Source: arXiv 2601.01608, eq. 7.
    """
    return weak + np.float32(scale) * (strong - weak)


@dataclass(frozen=True, slots=True)
class StepGuidance:
    """The guidance of one evaluation. `weak` is None if the strong branch runs alone."""

    strong: Level
    weak: Level | None
    scale: float


def guidance_table(
    plan: GuidancePlan,
    updates: Sequence[Update],
    strong_levels: Sequence[Level],
    weak_levels: Sequence[Level],
    last_step: int | None = None,
) -> tuple[StepGuidance, ...]:
    """Return the guidance of each evaluation of a run.

    A sparsity that changes over the run takes the nearest of the built levels and its own first and
    last level; of two equally near levels, the lower sparsity.
    strong_levels, weak_levels: levels that were built for the branch.
    last_step: step at which ramps end; by default the last step of `updates`.
    """
    last = max((update.step for update in updates), default=0) if last_step is None else last_step

    def at(time: float, step: int) -> StepGuidance:
        progress = step / last if last else 0.0
        strong = _level_at(plan.strong, plan.strong_last, progress, strong_levels)
        scale = plan.scale if plan.scale_last is None else cosine_ramp(plan.scale, plan.scale_last, progress)
        outside = plan.interval is not None and not plan.interval[0] <= time <= plan.interval[1]
        if plan.row.branches == 1 or outside:
            return StepGuidance(strong, None, scale)
        return StepGuidance(strong, _level_at(plan.weak, plan.weak_last, progress, weak_levels), scale)

    return tuple(at(update.time, update.step) for update in updates)


def cosine_ramp(first: float, last: float, progress: float) -> float:
    """Return the value at `progress`: `first` at 0, `last` at 1, half a cosine between them.

    Source: arXiv 2601.01608.
    """
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def _level_at(first: Level, last: Level | None, progress: float, built: Sequence[Level]) -> Level:
    if last is None:
        return first
    wanted = cosine_ramp(first.sparsity, last.sparsity, progress)
    return min((first, last, *built), key=lambda level: (abs(level.sparsity - wanted), level.sparsity))


def levels(manifest: Manifest, network: NetworkName = "main") -> list[Level]:
    """Return the sparsities for which the bundle has graphs of the network, densest first."""
    graphs = [graph for graph in manifest.graphs if graph.network == network]
    return sorted({level for graph in graphs for level in graph.levels}, key=lambda level: -level.keep)


def built_guidances(manifest: Manifest) -> list[GuidancePlan]:
    """Return every guidance plan with constant sparsities for which the bundle has graphs.

    The scale is the default scale of largest magnitude. If the bundle has guided graphs, there is
    one plan for each pair of levels of a guided graph. Otherwise each branch runs by a separate
    graph: one plan for each pair of a strong and a weak network's level in autoguidance, else one
    plan for each level.
    """
    plan = manifest.guidance
    scale = max(plan.scale, plan.scale if plan.scale_last is None else plan.scale_last, key=abs)
    pairs = []
    for graph in manifest.graphs:
        if graph.kind == "guided":
            strong, weak = graph.levels
            pairs.append(GuidancePlan(_mode_of(graph.null_weak, strong == weak), strong, weak, scale))
    if pairs:
        return pairs
    both: Iterable[tuple[Level, Level]]
    if plan.row.weak_network == "weak":
        both = itertools.product(levels(manifest), levels(manifest, "weak"))
    else:
        both = ((level, level) for level in levels(manifest))
    return [GuidancePlan(plan.mode, strong, weak, scale) for strong, weak in both]


def _mode_of(null_weak: bool, same_level: bool) -> GuidanceMode:
    """Return the guidance mode of a graph that contains both branches."""
    level = "same" if same_level else "sparser"
    return next(
        mode for mode, row in MODES.items() if row.fusible and (row.null_weak, row.weak_level) == (null_weak, level)
    )


def choose(
    manifest: Manifest,
    *,
    mode: GuidanceMode | None = None,
    strong_sparsity: Ramp | None = None,
    sparsity: Ramp | None = None,
    scale: Ramp | None = None,
    interval: tuple[float, float] | None = None,
    subset: SubsetRule | None = None,
) -> GuidancePlan:
    """Return the bundle's guidance plan with the given parts replaced.

    `sparsity` is the sparsity of the weak branch. In the modes none and cfg both branches share the
    strong sparsity. Raises UsageError if a sparsity or mode was not built; the message gives the
    build command that adds it.
    """
    plan = manifest.guidance
    chosen: GuidanceMode = plan.mode if mode is None else mode
    choice("guidance", chosen, tuple(MODES))
    row = MODES[chosen]
    network = row.weak_network
    manifest.hoisted(network)  # raises if the bundle lacks the network
    strong = (plan.strong, plan.strong_last)
    if strong_sparsity is not None:
        strong = _ends(manifest, strong_sparsity, "main", chosen, "--strong-sparsity")
    if row.weak_level == "same":
        if sparsity is not None:
            raise UsageError(f"{chosen} guidance has one sparsity: give the strong one, not the weak one")
        weak = strong
    elif sparsity is not None:
        weak = _ends(manifest, sparsity, network, chosen, "--sparsity")
    elif plan.row.weak_level != "same" and plan.row.weak_network == network:
        weak = (plan.weak, plan.weak_last)
    else:
        raise UsageError(_without_sparsity(manifest, chosen, strong[0], network))
    first, last = (plan.scale, plan.scale_last) if scale is None else ramp_ends("scale", scale)
    within = plan.interval if interval is None else pair("interval", interval, "the lowest and the highest time")
    rule = plan.subset if subset is None else subset
    return GuidancePlan(chosen, strong[0], weak[0], first, strong[1], weak[1], last, within, rule)


@dataclass(frozen=True, slots=True)
class PlanChanges:
    """Parts of a bundle's guidance plan to replace, before the bundle is known; see `choose`."""

    mode: GuidanceMode | None = None
    strong_sparsity: Ramp | None = None
    sparsity: Ramp | None = None
    scale: Ramp | None = None
    interval: tuple[float, float] | None = None
    subset: SubsetRule | None = None

    def of(self, manifest: Manifest) -> GuidancePlan:
        """Return the plan of a bundle with these parts replaced. Raises the errors of `choose`."""
        return choose(
            manifest,
            mode=self.mode,
            strong_sparsity=self.strong_sparsity,
            sparsity=self.sparsity,
            scale=self.scale,
            interval=self.interval,
            subset=self.subset,
        )


def with_scale(plan: GuidancePlan, scale: Ramp) -> GuidancePlan:
    """Return the plan with another scale."""
    first, last = ramp_ends("scale", scale)
    return replace(plan, scale=first, scale_last=last)


def ramp_ends(name: str, value: Ramp) -> tuple[float, float | None]:
    """Return the value of the first step and, if it changes, of the last step, else None.

    Raises UsageError with `name` if `value` is neither a number nor a sequence of two.
    """
    try:
        return number(name, value), None
    except UsageError:
        return pair(name, value, "a number, or two (of the first and the last step)")


def _ends(
    manifest: Manifest, sparsity: Ramp, network: NetworkName, mode: GuidanceMode, option: str
) -> tuple[Level, Level | None]:
    first, last = ramp_ends(option.removeprefix("--").replace("-", "_"), sparsity)
    level = _level(manifest, first, network, mode, option)
    return level, None if last is None else _level(manifest, last, network, mode, option)


def _level(manifest: Manifest, sparsity: float, network: NetworkName, mode: GuidanceMode, option: str) -> Level:
    built, model, text = levels(manifest, network), manifest.model, number_text(sparsity)
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {text}: expected at least 0 and less than 1")
    kept = KEPT[model.family](model.tokens, sparsity) if model.family in KEPT else None
    for level in built:
        if level.keep == kept or abs(level.sparsity - sparsity) < 1e-9:
            return level
    how = {"sg": (), "autoguidance": ("--weak-checkpoint", "PATH")}.get(mode, ("--guidance", mode))
    raise UsageError(
        f"sparsity {text} is not in this bundle, which has {_names(built)}; "
        f"build it with: {model_command(manifest, *how, option, text)}"
    )


def _without_sparsity(manifest: Manifest, mode: GuidanceMode, strong: Level, network: NetworkName) -> str:
    """Return the error message for a mode without a given or default weak sparsity."""
    usable = [level for level in levels(manifest, network) if network == "weak" or level.keep < strong.keep]
    if usable:
        return f"{mode}: give the weak sparsity, one of {_names(usable)}"
    how = () if mode == "sg" else ("--guidance", mode)
    dense = strong.keep == manifest.model.tokens
    levels_of_build = () if dense else ("--strong-sparsity", number_text(strong.sparsity))
    sparser = number_text((1 + strong.sparsity) / 2)
    return (
        f"{mode}: expected a branch sparser than {number_text(strong.sparsity)}, found none in this bundle; "
        f"build it with: {model_command(manifest, *how, *levels_of_build, '--sparsity', sparser)}"
    )


def _names(built: Sequence[Level]) -> str:
    return ", ".join(number_text(level.sparsity) for level in built)
