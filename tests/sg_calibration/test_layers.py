"""Which layers of a graph can be quantized."""

import onnx
import pytest

from sg_calibration.layers import check_names, layers_of, weights_of
from sg_export.models.dit import ENDS
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError

STEP = {f"blocks.{k}.{name}" for k in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
CONDITION = {"final_layer.adaLN_modulation.1", *(f"blocks.{k}.adaLN_modulation.1" for k in range(3))}


def test_layers_of_step_graphs_are_the_blocks_products(reference: Bundle) -> None:
    for graph in reference.manifest.graphs:
        layers = layers_of(onnx.load(reference.onnx(graph), load_external_data=False), ENDS)
        assert layers.keys() == (CONDITION if graph.kind == "condition" else STEP), graph.name


def test_layers_of_a_graph_name_its_nodes_and_their_inputs(guided: onnx.ModelProto) -> None:
    nodes = {node.name: node for node in guided.graph.node}
    for name, layer in layers_of(guided, ENDS).items():
        assert layer.name == name
        assert list(nodes[layer.node].input[:2]) == [layer.source, layer.weight]
        assert layer.weight.startswith(f"{name}.weight")


def test_weights_of_layers_are_their_shapes(guided: onnx.ModelProto) -> None:
    shapes = weights_of(guided, layers_of(guided, ENDS))
    assert {tuple(sorted(shapes[f"blocks.1.{name}"])) for name in ("attn.qkv", "mlp.fc1")} == {(32, 96), (32, 128)}


def test_check_names_of_an_unknown_layer_names_near_ones() -> None:
    check_names("`exclude`", ["blocks.1.mlp.fc1"], STEP)
    with pytest.raises(UsageError, match=r"`exclude` blocks.1.mlp.fc3: expected one of the 12 .*near: blocks.1.mlp.fc"):
        check_names("`exclude`", ["blocks.1.mlp.fc3"], STEP)
    with pytest.raises(UsageError, match=r"found none of that name$"):
        check_names("`exclude`", ["?"], STEP)
