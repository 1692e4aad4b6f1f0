"""The graphs of a bundle: what each computes, and the tensors it takes, in terms of one `SparseModel`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import GraphKind, Level, ModelFacts, TensorFacts


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One graph to trace. `levels`: none for condition, one for dense and sparse, strong and weak for guided."""

    kind: GraphKind
    levels: tuple[Level, ...] = ()

    @property
    def name(self) -> str:
        """File name without suffix, from the kept token counts."""
        counts = () if self.kind in ("condition", "dense") else (str(level.keep) for level in self.levels)
        return "-".join((self.kind, *counts))


def plan_graphs(strong: Sequence[Level], weak: Sequence[Level]) -> list[GraphSpec]:
    """All graphs of a bundle: condition, one per level, and one per pair whose weak branch is the sparser one."""
    singles = sorted({*strong, *weak}, key=lambda level: -level.keep)
    specs = [GraphSpec("condition")]
    specs += [GraphSpec("dense" if level.sparsity == 0 else "sparse", (level,)) for level in singles]
    specs += [GraphSpec("guided", (s, w)) for s in strong for w in weak if w.keep < s.keep]
    return specs


def inputs(spec: GraphSpec, model: ModelFacts, batch: int | None) -> tuple[TensorFacts, ...]:
    """The inputs of a graph, in order. A batch of None is the symbolic dimension "B"."""
    if spec.kind == "condition":
        return (TensorFacts("t", "float32", ("S",)), TensorFacts("class", "int64", ("S",)))
    images = "B" if batch is None else batch
    latent = (images, model.channels, model.image_size, model.image_size)
    step = [TensorFacts("x", "float32", latent), TensorFacts("modulations", "float32", (images, model.modulations))]
    names = {"dense": (), "sparse": ("keep",), "guided": ("keep_strong", "keep_weak")}[spec.kind]
    step += [
        TensorFacts(name, "int64", (images, level.keep))
        for name, level in zip(names, spec.levels, strict=False)
        if level.keep < model.tokens
    ]
    if spec.kind == "guided":
        step.append(TensorFacts("scale", "float32", ()))
    return tuple(step)


def outputs(spec: GraphSpec, model: ModelFacts, batch: int | None) -> tuple[TensorFacts, ...]:
    """The outputs of a graph; arguments as in `inputs`."""
    if spec.kind == "condition":
        return (TensorFacts("modulations", "float32", ("S", model.modulations)),)
    latent = ("B" if batch is None else batch, model.channels, model.image_size, model.image_size)
    return (TensorFacts("prediction", "float32", latent),)


class GraphModule(nn.Module):
    """The computation of one graph; its arguments are the graph's inputs, in order."""

    def __init__(self, model: SparseModel, spec: GraphSpec, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.kind = spec.kind
        self.names = tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.names, values, strict=True))
        if self.kind == "condition":
            return self.model.condition(given["t"], given["class"])
        if self.kind == "guided":
            return self.model.guided(
                given["x"], given["modulations"], given.get("keep_strong"), given["keep_weak"], given["scale"]
            )
        return self.model.predict(given["x"], given["modulations"], given.get("keep"))


def example(tensor: TensorFacts, tokens: int, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    """A random value for an input: times in (0, 1), distinct sorted indices, small numbers. `sizes`: symbolic sizes."""
    shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
    if tensor.name == "t":
        return torch.rand(shape, generator=generator)
    if tensor.name == "class":
        return torch.zeros(shape, dtype=torch.int64)
    if tensor.dtype == "int64":
        order = torch.rand((shape[0], tokens), generator=generator).argsort(dim=1)
        return order[:, : shape[1]].sort(dim=1).values
    return torch.randn(shape, generator=generator)
