"""The computation of a graph in PyTorch, and example values for its inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sg_export.graph.spec import GraphSpec
from sg_export.models.sparse import BranchInputs, SparseModel
from sg_export.models.subset import Subset
from sg_runtime.conditions import Conditions
from sg_runtime.manifest import GraphKind, ModelFacts, TensorFacts
from sg_runtime.vocabulary import HELD, HOISTED


class GraphModule(nn.Module):
    """The computation of one graph as a module. Its arguments are the graph's inputs, in order."""

    def __init__(self, model: SparseModel, spec: GraphSpec, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.kind = spec.kind
        self.names = tuple(names)

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the graph's outputs: a tensor, or a tuple if there are several."""
        outputs = compute(self.model, self.kind, dict(zip(self.names, values, strict=True)))
        return outputs[0] if len(outputs) == 1 else outputs


def columns_in_torch(conditions: Conditions, *, weak: bool = False) -> dict[str, Tensor]:
    """Return the condition of each image as the argument `conditions` of a `SparseModel`.

    weak: whether the condition that a weak branch has of its own.
    """
    return {name: torch.from_numpy(values) for name, values in conditions.rows(weak=weak).items()}


def compute(model: SparseModel, kind: GraphKind, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Compute the outputs of a graph of this kind from its inputs by name."""
    if kind in HOISTED:
        return model.hoist(kind, given)
    x, branches = given["x"], branch_inputs(kind, given)
    if kind == "guided":
        output = model.guided(given["c_in"] * x, branches[0], branches[1], given["scale"])
    else:
        output = model.predict(given["c_in"] * x, branches[0].held, branches[0].keep)
    prediction = given["c_skip"] * x + given["c_out"] * output
    return prediction, given["a"] * x + given["b"] * prediction + given["e"] * given["r"]


def branch_inputs(kind: GraphKind, given: Mapping[str, Tensor]) -> list[BranchInputs]:
    """Return the inputs of the one branch of a step graph, or of the strong and the weak branch.

    The weak branch shares what has no input of its own.
    """
    held = {name: given[name] for name in HELD if name in given}
    if kind != "guided":
        return [BranchInputs(held, _subset(given, ""))]
    own = {name: given.get(f"{name}_weak", shared) for name, shared in held.items()}
    return [BranchInputs(held, _subset(given, "_strong")), BranchInputs(own, _subset(given, "_weak"))]


def _subset(given: Mapping[str, Tensor], end: str) -> Subset | None:
    """Return the kept tokens of the branch whose inputs have this end; None for all tokens."""
    return Subset(given[f"rows{end}"], given[f"restore{end}"]) if f"rows{end}" in given else None


def random_inputs(
    tensors: Sequence[TensorFacts], model: ModelFacts, sizes: Mapping[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return example values for the inputs of a graph, by name and in order.

    Times are random in [0, 1), classes are 0, half of a prompt's tokens are padding, kept tokens
    are random, distinct and sorted, and all other values are normally distributed.

    sizes: values of the symbolic dimensions.
    """
    values: dict[str, Tensor] = {}
    for tensor in tensors:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        if tensor.name == "t":
            values[tensor.name] = torch.rand(shape, generator=generator)
        elif tensor.name == "class":
            values[tensor.name] = torch.zeros(shape, dtype=torch.int64)
        elif tensor.name == "mask":
            values[tensor.name] = (torch.arange(shape[1]) <= shape[1] // 2).long().expand(shape).clone()
        elif tensor.name.startswith("rows"):
            order = torch.rand((shape[0], model.tokens), generator=generator).argsort(dim=1)
            kept = Subset.of(order[:, : shape[1]].sort(dim=1).values, model.tokens, model.masked)
            values[tensor.name], values[tensor.name.replace("rows", "restore")] = kept.rows, kept.restore
        elif tensor.name not in values:
            values[tensor.name] = torch.randn(shape, generator=generator)
    return values
