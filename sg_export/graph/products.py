"""Products with a weight (matmuls and convolutions), their modules, and tables of embeddings."""

from collections.abc import Iterable, Iterator

import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm", "Conv")
"""Operators that take a weight as their second input."""

TOKEN_IDS = "ids"
"""Input of a text encoder's graph: numbers of tokens, which are rows of its table of embeddings."""


def belongs(weight: str, layers: Iterable[str]) -> bool:
    """Whether a weight belongs to one of the modules `layers`. Both are names in the checkpoint."""
    return any(weight.startswith(f"{layer}.") for layer in layers)


def weighted_products(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Yield each product with a weight, after the weight's name in the checkpoint."""
    for node in graph:
        if (weight := weight_of(node)) is not None:
            yield str(weight.name).removesuffix("_quantized").removesuffix(".T"), node


def weight_of(node: ir.Node) -> ir.Value | None:
    """Return the initializer that is the weight of a product; None if there is none.

    The weight may reach the product through a DequantizeLinear.
    """
    weight = node.inputs[1] if node.op_type in PRODUCTS else None
    if weight is not None and (source := weight.producer()) is not None and source.op_type == "DequantizeLinear":
        weight = source.inputs[0]
    return weight if weight is not None and weight.is_initializer() else None


def token_table(node: ir.Node) -> ir.Value | None:
    """Return the table of embeddings whose rows a node takes by `TOKEN_IDS`; None if it is none.

    It is large, and a run reads one row of it per token.
    """
    if node.op_type != "Gather":
        return None
    table, rows = node.inputs
    by_token = rows is not None and rows.is_graph_input() and rows.name == TOKEN_IDS
    return table if by_token and table is not None and table.is_initializer() else None
