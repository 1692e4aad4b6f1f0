"""Layers of a bundle that can be quantized."""

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
    """Size and cost of a quantizable layer.

    weight_bytes: bytes of its FP32 weight. linear_macs: multiply-adds for one image. in_steps:
    whether it is in a step graph; otherwise it is only in a hoisted graph. of_text: whether it is
    only in `prompt`, a projection of the text.
    """

    weight_bytes: int
    linear_macs: int
    in_steps: bool
    of_text: bool


def quantizable_layers(reference: Bundle) -> dict[str, LayerFacts]:
    """Return all quantizable layers by name, in the order of the network.

    Multiply-adds are counted in the first graph that has the layer, guided graphs first. If the
    bundle has two networks, bytes and multiply-adds are sums over both.
    """
    found: dict[str, dict[NetworkName, LayerFacts]] = {}
    for graph in sorted(reference.manifest.graphs, key=lambda graph: graph.kind != "guided"):
        path = reference.onnx(graph)
        model, in_steps = ir.load(path).graph, not graph.hoisted
        macs = layer_macs(model, keep_sizes(GraphSpec(graph.kind, graph.levels), [lv.keep for lv in graph.levels]))
        for name, layer in layers_of(onnx.load(path, load_external_data=False), reference.manifest.model.ends).items():
            weight = model.initializers[layer.weight].const_value
            assert weight is not None
            layer_facts = LayerFacts(
                weight.nbytes, macs[layer.weight.removesuffix(".T")], in_steps, graph.kind == "prompt"
            )
            found.setdefault(name, {}).setdefault(graph.network, layer_facts)
    facts = {}
    for name in sorted(found, key=reading_order):
        networks = found[name].values()
        facts[name] = LayerFacts(
            sum(one.weight_bytes for one in networks),
            sum(one.linear_macs for one in networks),
            any(one.in_steps for one in networks),
            all(one.of_text for one in networks),
        )
    return facts


def reading_order(name: str) -> list[str]:
    """Return a sort key for layer names that orders the numbers in them by value."""
    return [part.zfill(4) if part.isdigit() else part for part in name.split(".")]
