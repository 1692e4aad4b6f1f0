"""Quality gates of a quantized bundle, and the messages if they fail."""

import statistics
import time
from collections.abc import Sequence

from sg_export.options.quantize import QuantizeOptions
from sg_export.parity.walk import Walk
from sg_runtime.manifest import (
    QualityGates,
    StratumQuality,
)
from sg_runtime.pipeline import Pipeline

TIMING_ROUNDS = 7


def time_ratio(candidate: Pipeline, pipe: Pipeline, own: Walk) -> float:
    """Return the time of a guided evaluation by `candidate`, divided by the time by `pipe`.

    Both are timed in turn; the result is the median over TIMING_ROUNDS rounds. own: a walk whose
    first state is evaluated.
    """
    plans = {
        side: side.prepare(own.times[:1], own.conditions, own.seeds, guidance=own.guidance)
        for side in (candidate, pipe)
    }

    def seconds(side: Pipeline) -> float:
        began = time.perf_counter()
        side.guided(own.states[0], plans[side], 0)
        return time.perf_counter() - began

    return statistics.median([seconds(candidate) / seconds(pipe) for _ in range(TIMING_ROUNDS)])


def gates_hold(quality: Sequence[StratumQuality], gates: QualityGates, margin: float = 1.0) -> bool:
    """Whether the gates hold at every time.

    margin: share of each gate's tolerance that may be used; 1 for the gates themselves.
    """
    least = 1 - margin * (1 - gates.cosine)
    return all(min(q.strong, q.weak) >= least and q.guided <= margin * gates.guided for q in quality)


def gates_failure(quality: Sequence[StratumQuality], options: QuantizeOptions) -> str:
    """Return a message with the gates and the worst values found."""
    gates = options.effective_gates
    branch = min(quality, key=lambda q: min(q.strong, q.weak))
    guided = max(quality, key=lambda q: q.guided)
    return (
        f"{options.type}: expected a cosine of at least {gates.cosine:g} for each branch and a guided prediction "
        f"within {gates.guided:.0%} at every time, found {min(branch.strong, branch.weak):.4f} at {branch.time:.3g} "
        f"and {guided.guided:.1%} at {guided.time:.3g}"
    )


def gates_remedy(options: QuantizeOptions) -> str:
    """Return the part of a message that lists remedies for a result that fails its gates."""
    ways = ["another `method`", "wider gates", "`allow_quality_loss`"]
    if options.like is not None:
        ways.insert(0, "a layer search instead of `like`")
    if options.table is None and options.data is None:
        ways.insert(0, "more `samples`")
    return f"try {', '.join(ways[:-1])}, or {ways[-1]}"
