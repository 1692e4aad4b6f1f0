"""Choice of the levels and pairs of levels that a build makes graphs of."""

import itertools
from collections.abc import Iterable, Sequence

from sg_export.graph.spec import GraphSpec, graphs_for
from sg_export.loading import LoadedModel
from sg_export.options.compile import DEFAULT_SPARSITY, CompileOptions
from sg_runtime.errors import UsageError
from sg_runtime.guidance import ramp_ends
from sg_runtime.manifest import (
    MODES,
    UPSTREAM_SUBSET,
    GuidancePlan,
    Level,
    Manifest,
)


def choose_graphs(
    loaded: LoadedModel, weak_loaded: LoadedModel | None, options: CompileOptions
) -> tuple[GuidancePlan, list[GraphSpec]]:
    """Return the bundle's guidance plan and its graphs.

    Raises UsageError for sparsities that the model does not allow, and for two equal levels.
    """
    mode = options.mode
    strong = _levels(loaded, options.strong_sparsity)
    weak = strong
    row = MODES[mode]
    if row.weak_level != "same":
        weak = _levels(weak_loaded or loaded, options.sparsity or (DEFAULT_SPARSITY,))
    if weak_loaded is None:
        _check_distinct({*strong, *weak})
    if row.weak_level == "sparser" and options.schedule == "constant":
        for level in weak:
            if level.sparsity == 0:
                raise UsageError("sparsity 0 keeps all tokens: use a higher sparsity for the weak branch")

    def last(levels: Sequence[Level]) -> Level | None:
        return levels[-1] if options.schedule == "cosine" and len(levels) > 1 else None

    scale, scale_last = ramp_ends("scale", options.scale)
    subset = options.subset or UPSTREAM_SUBSET[loaded.facts.family]
    ends = (last(strong), last(weak), scale_last)
    plan = GuidancePlan(mode, strong[0], weak[0], scale, *ends, options.interval, subset)
    return plan, graphs_for(mode, strong, weak, loaded.facts.conditions.hoisted)


def _levels(loaded: LoadedModel, sparsities: Sequence[float]) -> list[Level]:
    levels = [loaded.level(sparsity) for sparsity in sparsities]
    _check_distinct(levels)
    return levels


def _check_distinct(levels: Iterable[Level]) -> None:
    """Raise UsageError if two sparsities keep the same number of tokens.

    The number of kept tokens identifies a graph, so it may come from only one sparsity.
    """
    for a, b in itertools.combinations(sorted(levels, key=lambda level: level.sparsity), 2):
        if a.keep == b.keep:
            raise UsageError(
                f"sparsities {a.sparsity:g} and {b.sparsity:g} both keep {a.keep} tokens: give one of them"
            )


def skipped_pairs(options: CompileOptions, manifest: Manifest) -> list[tuple[float, float]]:
    """Return the pairs of strong and weak sparsity without a guided graph.

    They have no guided graph because their weak branch is not sparser.
    """
    if MODES[options.mode].weak_level != "sparser":
        return []
    built = [tuple(level.sparsity for level in graph.levels) for graph in manifest.graphs if graph.kind == "guided"]
    wanted = itertools.product(options.strong_sparsity, options.sparsity or (DEFAULT_SPARSITY,))
    return [pair for pair in wanted if pair not in built]
