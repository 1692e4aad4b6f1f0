"""The graphs of a bundle: what each computes, and the tensors it takes, in terms of one `SparseModel`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sg_runtime.manifest import (
    MODES,
    GraphKind,
    GuidanceMode,
    GuidancePlan,
    Level,
    ModelFacts,
    NetworkName,
    TensorFacts,
)

TAIL = ("c_in", "c_skip", "c_out", "a", "b", "e")
"""Scalars of the update: D = c_skip * x + c_out * network(c_in * x), next = a * x + b * D + e * r."""


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One graph to trace. `levels`: none for condition, one for dense and sparse, strong and weak for guided.

    null_weak: a guided graph whose weak branch has a condition of its own, "no class".
    """

    kind: GraphKind
    levels: tuple[Level, ...] = ()
    network: NetworkName = "main"
    null_weak: bool = False

    @property
    def name(self) -> str:
        """From the kept token counts, as guided-256-128."""
        return self._name([str(level.keep) for level in self.levels])

    @property
    def shared_name(self) -> str:
        """That of all graphs which differ only in how many tokens they keep, as guided-256-K."""
        return self._name([str(level.keep) if level.sparsity == 0 else "K" for level in self.levels])

    def _name(self, counts: Sequence[str]) -> str:
        prefix, suffix = ("weak",) * (self.network == "weak"), ("null",) * self.null_weak
        return "-".join((*prefix, self.kind, *(() if self.kind == "dense" else counts), *suffix))


def graphs_for(mode: GuidanceMode, strong: Sequence[Level], weak: Sequence[Level]) -> list[GraphSpec]:
    """All graphs of a bundle: the condition, one graph per level, and one per pair that the mode allows.

    sg and cfg+sg pair each strong level with the sparser weak ones, cfg each with itself. The weak levels of
    autoguidance are another network's, with which nothing is shared: it has graphs of its own, and no pairs.
    """
    row = MODES[mode]
    if row.weak_network == "weak":
        return [*_singles(strong, "main"), *_singles(weak, "weak")]
    pairs = [(s, w) for s in strong for w in weak if (w.keep < s.keep if row.weak_level == "sparser" else w == s)]
    guided = [GraphSpec("guided", pair, null_weak=row.null_weak) for pair in pairs if row.branches == 2]
    return [*_singles({*strong, *weak}, "main"), *guided]


def guided_alone(plan: GuidancePlan) -> bool:
    """Whether guided graphs are all that a run of the plan needs, with the condition."""
    ends = (plan.strong_last, plan.weak_last)
    return plan.row.fusible and plan.interval is None and ends == (None, None)


def _singles(levels: Iterable[Level], network: NetworkName) -> list[GraphSpec]:
    """The condition of a network and its single-branch graphs, densest first."""
    ordered = sorted(levels, key=lambda level: -level.keep)
    kinds: list[GraphKind] = ["dense" if level.sparsity == 0 else "sparse" for level in ordered]
    branches = [GraphSpec(kind, (level,), network) for kind, level in zip(kinds, ordered, strict=True)]
    return [GraphSpec("condition", network=network), *branches]


def graph_inputs(
    spec: GraphSpec, model: ModelFacts, batch: int | None, *, symbolic_keep: bool = False
) -> tuple[TensorFacts, ...]:
    """The inputs of a graph, in order.

    A batch of None is the symbolic dimension "B". symbolic_keep: kept token counts are the dimensions "K", or
    "K_strong" and "K_weak", so that the graph is that of all levels.
    """
    if spec.kind == "condition":
        return (TensorFacts("t", "float32", ("S",)), TensorFacts("class", "int64", ("S",)))
    images = "B" if batch is None else batch
    latent = (images, *model.latent)
    rows = ("modulations", "modulations_weak") if spec.null_weak else ("modulations",)
    names = {"dense": (), "sparse": ("keep",), "guided": ("keep_strong", "keep_weak")}[spec.kind]
    scalars = ("scale", *TAIL) if spec.kind == "guided" else TAIL
    return (
        TensorFacts("x", "float32", latent),
        *(TensorFacts(name, "float32", (images, model.modulations)) for name in rows),
        *(
            TensorFacts(name, "int64", (images, name.replace("keep", "K") if symbolic_keep else level.keep))
            for name, level in zip(names, spec.levels, strict=False)
            if level.keep < model.tokens
        ),
        *(TensorFacts(name, "float32", ()) for name in scalars),
        TensorFacts("r", "float32", latent),
    )


def keep_sizes(spec: GraphSpec, keep: Sequence[int]) -> dict[str, int]:
    """The sizes of the dimensions that stand for kept token counts in a graph with `symbolic_keep`."""
    return dict(zip({"sparse": ("K",), "guided": ("K_strong", "K_weak")}.get(spec.kind, ()), keep, strict=False))


def graph_outputs(spec: GraphSpec, model: ModelFacts, batch: int | None) -> tuple[TensorFacts, ...]:
    """The outputs of a graph; arguments as in `graph_inputs`."""
    if spec.kind == "condition":
        return (TensorFacts("modulations", "float32", ("S", model.modulations)),)
    latent = ("B" if batch is None else batch, *model.latent)
    return (TensorFacts("prediction", "float32", latent), TensorFacts("next", "float32", latent))
