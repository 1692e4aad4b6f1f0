"""Specifications of a bundle's graphs: what each one computes, and its input and output tensors.

A graph is one computation of a `SparseModel`, or of the text encoder or decoder next to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from sg_runtime.manifest import (
    MODES,
    GraphKind,
    GuidanceMode,
    GuidancePlan,
    Level,
    ModelFacts,
    NetworkName,
    TensorFacts,
    Text,
    decode_inputs,
    decode_outputs,
    size_text,
    text_inputs,
    text_outputs,
)
from sg_runtime.vocabulary import HELD, HOISTED, step_inputs


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One graph to trace.

    kind: what the graph computes.
    levels: one for dense and sparse, strong and weak for guided, none for the others.
    network: the network that the graph belongs to.
    null_weak: whether the weak branch of a guided graph has the condition "no class".
    size: size of the samples, see `ModelFacts.size`, if the bundle has several and the graph
    depends on it; else None.
    """

    kind: GraphKind
    levels: tuple[Level, ...] = ()
    network: NetworkName = "main"
    null_weak: bool = False
    size: tuple[int, int] | None = None

    @property
    def hoisted(self) -> bool:
        """Whether the graph runs before the sampling loop."""
        return self.kind in HOISTED

    @property
    def name(self) -> str:
        """Name of the graph with its numbers of kept tokens, as guided-256-128.

        A size precedes it, as 256x512-guided-256-128.
        """
        return self._name([str(level.keep) for level in self.levels])

    @property
    def shared_name(self) -> str:
        """Common name of the graphs that differ only in numbers of kept tokens, as guided-256-K."""
        return self._name([str(level.keep) if level.sparsity == 0 else "K" for level in self.levels])

    def _name(self, counts: Sequence[str]) -> str:
        prefix, suffix = ("weak",) * (self.network == "weak"), ("null",) * self.null_weak
        prefix = prefix if self.size is None else (size_text(self.size), *prefix)
        return "-".join((*prefix, self.kind, *(() if self.kind == "dense" else counts), *suffix))


def graphs_for(
    mode: GuidanceMode, strong: Sequence[Level], weak: Sequence[Level], hoisted: Iterable[GraphKind]
) -> list[GraphSpec]:
    """Return all graphs of a bundle.

    They are the hoisted graphs, one graph per level, and one guided graph per pair of levels that
    the mode allows. sg and cfg+sg pair each strong level with the sparser weak levels. cfg pairs
    each level with itself. In autoguidance the weak levels belong to another network, so there are
    no pairs, and that network has hoisted and single-branch graphs too.

    hoisted: kinds of the hoisted graphs.
    """
    row = MODES[mode]
    if row.weak_network == "weak":
        return [*_singles(strong, "main", hoisted), *_singles(weak, "weak", hoisted)]
    pairs = [(s, w) for s in strong for w in weak if (w.keep < s.keep if row.weak_level == "sparser" else w == s)]
    guided = [GraphSpec("guided", pair, null_weak=row.null_weak) for pair in pairs if row.branches == 2]
    return [*_singles({*strong, *weak}, "main", hoisted), *guided]


def guided_alone(plan: GuidancePlan) -> bool:
    """Whether a run of the plan needs only the hoisted and guided graphs."""
    ends = (plan.strong_last, plan.weak_last)
    return plan.row.fusible and plan.interval is None and ends == (None, None)


def _singles(levels: Iterable[Level], network: NetworkName, hoisted: Iterable[GraphKind]) -> list[GraphSpec]:
    """Return the hoisted graphs of a network and its single-branch graphs, densest first."""
    ordered = sorted(levels, key=lambda level: -level.keep)
    kinds: list[GraphKind] = ["dense" if level.sparsity == 0 else "sparse" for level in ordered]
    branches = [GraphSpec(kind, (level,), network) for kind, level in zip(kinds, ordered, strict=True)]
    return [*(GraphSpec(kind, network=network) for kind in hoisted), *branches]


def graph_inputs(
    spec: GraphSpec, model: ModelFacts, batch: int | None, *, symbolic_keep: bool = False
) -> tuple[TensorFacts, ...]:
    """Return the inputs of a graph in FP32, in order.

    batch: number of images; None for the symbolic dimension "B". Hoisted graphs have S rows.
    symbolic_keep: make the numbers of kept tokens the symbolic dimensions "K", or "K_strong" and
    "K_weak", so that one graph serves all levels.
    """
    if spec.hoisted:
        return model.conditions.hoisted[spec.kind]
    if spec.kind == "text":
        return text_inputs(_text(model).tokens)
    if spec.kind == "decode":
        return decode_inputs(model.latent)
    images, held = "B" if batch is None else batch, model.held
    tensors = []
    for tensor in step_inputs(len(spec.levels), held, conditioned(held) if spec.null_weak else ()):
        if tensor.role == "state":
            tensors.append(TensorFacts(tensor.name, "float32", (images, *model.latent)))
        elif tensor.role == "held":
            tensors.append(TensorFacts(tensor.name, "float32", (images, *held[tensor.name.removesuffix("_weak")])))
        elif tensor.role == "scalar":
            tensors.append(TensorFacts(tensor.name, "float32", ()))
        elif tensor.branch is not None and (keep := spec.levels[tensor.branch].keep) < model.tokens:
            size: int | str = model.tokens
            if tensor.role == "rows":
                size = _keep_dimension(tensor.name) if symbolic_keep else keep
            tensors.append(TensorFacts(tensor.name, "int64", (images, size)))
    return tuple(tensors)


def conditioned(held: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the inputs for the conditioning that depend on class or prompt.

    If there are inputs per image, they hold the prompt, and the modulations depend on time alone.
    Otherwise the modulations also depend on the class.
    """
    names = tuple(held)
    return tuple(name for name in names if HELD[name] == "image") or names


def keep_sizes(spec: GraphSpec, keep: Sequence[int]) -> dict[str, int]:
    """Return the sizes of the symbolic dimensions of kept tokens; see `graph_inputs`.

    keep: numbers of kept tokens, in the order of the graph's levels.
    """
    if spec.kind not in ("sparse", "guided"):
        return {}
    names = [tensor.name for tensor in step_inputs(len(spec.levels), ()) if tensor.role == "rows"]
    return dict(zip(map(_keep_dimension, names), keep, strict=False))


def _keep_dimension(name: str) -> str:
    """Return the symbolic dimension of an input "rows": K, K_strong or K_weak."""
    return name.replace("rows", "K")


def graph_outputs(spec: GraphSpec, model: ModelFacts, batch: int | None) -> tuple[TensorFacts, ...]:
    """Return the outputs of a graph; arguments as in `graph_inputs`."""
    if spec.hoisted:
        return tuple(TensorFacts(name, "float32", ("S", *model.held[name])) for name in HOISTED[spec.kind])
    if spec.kind == "text":
        return text_outputs(_text(model).tokens, _text(model).width)
    if spec.kind == "decode":
        assert model.pixels_per_latent is not None
        return decode_outputs(model.latent, model.pixels_per_latent)
    latent = ("B" if batch is None else batch, *model.latent)
    return (TensorFacts("prediction", "float32", latent), TensorFacts("next", "float32", latent))


_DTYPES: dict[ir.DataType, Literal["float32", "float16", "bfloat16", "int64"]] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
}


def _text(model: ModelFacts) -> Text:
    assert isinstance(model.conditions, Text)  # the text encoder is of a model with text
    return model.conditions


def typed(tensors: Iterable[TensorFacts], values: Iterable[ir.Value]) -> tuple[TensorFacts, ...]:
    """Return inputs or outputs of a graph with the types of its values."""
    types = {value.name: value.dtype for value in values}
    return tuple(replace(tensor, dtype=_DTYPES[types[tensor.name]]) for tensor in tensors)  # type: ignore[index]
