"""The computation of a graph in PyTorch, and example values for its inputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sg_export.graph.spec import GraphSpec
from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import GraphKind, TensorFacts


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


def compute(model: SparseModel, kind: GraphKind, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Compute the outputs of a graph of this kind from its inputs by name."""
    if kind == "condition":
        return (model.condition(given["t"], given["class"]),)
    x, modulations = given["x"], given["modulations"]
    if kind == "guided":
        output = model.guided(
            given["c_in"] * x,
            modulations,
            given.get("keep_strong"),
            given.get("keep_weak"),
            given["scale"],
            given.get("modulations_weak"),
        )
    else:
        output = model.predict(given["c_in"] * x, modulations, given.get("keep"))
    prediction = given["c_skip"] * x + given["c_out"] * output
    return prediction, given["a"] * x + given["b"] * prediction + given["e"] * given["r"]


def example(tensor: TensorFacts, tokens: int, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    """Return an example value for a graph input.

    Times are random in [0, 1), classes are 0, indices of kept tokens are random, distinct and
    sorted, and all other values are normally distributed.

    tokens: number of tokens of an image. sizes: values of the symbolic dimensions.
    """
    shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
    if tensor.name == "t":
        return torch.rand(shape, generator=generator)
    if tensor.name == "class":
        return torch.zeros(shape, dtype=torch.int64)
    if tensor.dtype == "int64":
        order = torch.rand((shape[0], tokens), generator=generator).argsort(dim=1)
        return order[:, : shape[1]].sort(dim=1).values
    return torch.randn(shape, generator=generator)
