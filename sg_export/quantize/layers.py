"""The layers of a bundle that can be quantized."""

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from sg_calibration.layers import layers_of
from sg_export.cost.count import layer_macs
from sg_export.graph.spec import GraphSpec, keep_sizes
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import (
    NetworkName,
)


@dataclass(frozen=True, slots=True)
class LayerFacts:
    weight_bytes: int
    linear_macs: int
    in_steps: bool


def quantizable_layers(reference: Bundle) -> dict[str, LayerFacts]:
    """All quantizable layers, in the order of the network.

    Multiply-adds are of the first guided or other step graph, bytes and multiply-adds of both networks together.
    """
    found: dict[str, dict[NetworkName, LayerFacts]] = {}
    for graph in sorted(reference.manifest.graphs, key=lambda graph: graph.kind != "guided"):
        path = reference.onnx(graph)
        model, in_steps = ir.load(path).graph, graph.kind != "condition"
        macs = layer_macs(model, keep_sizes(GraphSpec(graph.kind, graph.levels), [lv.keep for lv in graph.levels]))
        for name, layer in layers_of(onnx.load(path, load_external_data=False), reference.manifest.model.ends).items():
            weight = model.initializers[layer.weight].const_value
            assert weight is not None
            own = LayerFacts(weight.nbytes, macs[layer.weight.removesuffix(".T")], in_steps)
            found.setdefault(name, {}).setdefault(graph.network, own)
    facts = {}
    for name in sorted(found, key=reading_order):
        networks = found[name].values()
        facts[name] = LayerFacts(
            sum(one.weight_bytes for one in networks),
            sum(one.linear_macs for one in networks),
            any(one.in_steps for one in networks),
        )
    return facts


def reading_order(name: str) -> list[str]:
    """Sorts names with numbers as a reader does."""
    return [part.zfill(4) if part.isdigit() else part for part in name.split(".")]
