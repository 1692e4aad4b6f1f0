"""Layers of a graph that can be quantized, identified by the names of their modules."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from sg_runtime.errors import UsageError

PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Layer:
    """A MatMul or Gemm with a constant weight.

    name: name of the module. node: name of the node in the graph. source, weight: names of its
    activation input and its weight input.
    """

    name: str
    node: str
    source: str
    weight: str


def layers_of(model: onnx.ModelProto, ends: Sequence[str] = ()) -> dict[str, Layer]:
    """Return the quantizable layers of a graph by name.

    These are all products with a weight, except those in the modules `ends`.
    The products within attention have no weight, so they are left out. Operators that move, add or
    normalise tokens are not products, so they are left out too.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in PRODUCTS and node.input[1] in weights:
            name = node.input[1].removesuffix(".T").removesuffix(".weight")
            if not any(f"{name}.".startswith(f"{end}.") for end in ends):
                found[name] = Layer(name, node.name, node.input[0], node.input[1])
    return found


def check_names(option: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise UsageError if a name is not the name of a layer. The error lists the closest names."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise UsageError(
                f"{option} {name}: expected one of the {len(known)} quantizable layers, found none of that name{hint}"
            )


def weights_of(model: onnx.ModelProto, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the layers' weights by layer name."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return {name: shapes[layer.weight] for name, layer in layers.items()}
