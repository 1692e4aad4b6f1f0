"""Products with a weight: matrix products and convolutions, and whose they are."""

from collections.abc import Iterable, Iterator

import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm", "Conv")
"""Operators that take a weight as their second input."""


def belongs(weight: str, layers: Iterable[str]) -> bool:
    """Whether a weight, by its name in the checkpoint, is one of these modules'."""
    return any(weight.startswith(f"{layer}.") for layer in layers)


def weighted_products(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """The matrix products and convolutions with a weight, and its name in the checkpoint."""
    for node in graph:
        if (weight := weight_of(node)) is not None:
            yield str(weight.name).removesuffix("_quantized").removesuffix(".T"), node


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initializer that a product takes as its weight, be it through a DequantizeLinear; else None."""
    weight = node.inputs[1] if node.op_type in PRODUCTS else None
    if weight is not None and (source := weight.producer()) is not None and source.op_type == "DequantizeLinear":
        weight = source.inputs[0]
    return weight if weight is not None and weight.is_initializer() else None
