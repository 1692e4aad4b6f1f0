"""Compare two bundles of one model: graphs node by node up to names, costs, images bit for bit.

    python -m benchmarks.same_bundle BEFORE AFTER --output benchmarks/results/same_bundle.json

The bundles are two builds of one checkpoint, for example by two revisions of this project. The
output says for each graph how many nodes both have, and which nodes only one of them has. The
manifest of BEFORE may be of an earlier schema.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sg_runtime import Pipeline
from sg_runtime.bundle import Bundle

CLASSES, STEPS = 4, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--output", type=Path, help="append the result to this JSON file")
    options = parser.parse_args()
    result = compared(Bundle.open(options.before), Bundle.open(options.after))
    print(json.dumps(result, indent=1))
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.exists() else []
        options.output.write_text(json.dumps([*known, result], indent=1) + "\n")


def compared(before: Bundle, after: Bundle) -> dict[str, Any]:
    """Differences between two bundles, by graph."""
    graphs = {}
    names = {graph.name: graph for graph in after.manifest.graphs}
    for graph in before.manifest.graphs:
        other = names.pop(graph.name)
        old, new = described(ir.load(before.onnx(graph)).graph), described(ir.load(after.onnx(other)).graph)
        graphs[graph.name] = {
            "equal_nodes": (old & new).total(),
            "only_before": sorted(str(node[:2]) for node in (old - new).elements()),
            "only_after": sorted(str(node[:2]) for node in (new - old).elements()),
            "same_cost": graph.cost == other.cost,
            "same_inputs": (graph.inputs, graph.outputs) == (other.inputs, other.outputs),
        }
    model = before.manifest.model
    classes, seeds = [k % model.labels.count for k in range(CLASSES)], range(CLASSES)
    first, second = (Pipeline.load(bundle.path).sample(classes, seeds, steps=STEPS) for bundle in (before, after))
    return {
        "checkpoint": before.manifest.source.name,
        "family": model.family,
        "precision": before.manifest.precision_name,
        "batch": before.manifest.batch,
        "graphs": graphs,
        "only_after": sorted(names),
        "same_images": bool(np.array_equal(first, second)),
        "images": hashlib.sha256(first.tobytes()).hexdigest(),
    }


def described(graph: ir.Graph) -> Counter[tuple[Hashable, ...]]:
    """Describe the nodes of a graph by operator, attributes, and a hash of all that they depend on.

    A weight is described by its content, a graph input by its name. Outputs count as nodes.
    """
    known: dict[ir.Value | None, Hashable] = {None: None}
    for value in graph.inputs:
        known[value] = (value.name, str(value.dtype), str(value.shape))
    for value in graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        known[value] = (str(tensor.dtype), str(tensor.shape), hashlib.sha256(tensor.tobytes()).hexdigest())
    nodes: list[tuple[Hashable, ...]] = []
    for node in graph:
        attributes = tuple(sorted((key, str(attribute.value)) for key, attribute in node.attributes.items()))
        shapes = tuple((str(value.dtype), str(value.shape)) for value in node.outputs)
        above = hashlib.sha256(repr([known[value] for value in node.inputs]).encode()).hexdigest()
        nodes.append((node.op_type, attributes, node.domain, shapes, above))
        digest = hashlib.sha256(repr(nodes[-1]).encode()).hexdigest()
        known |= {value: (digest, place) for place, value in enumerate(node.outputs)}
    nodes += [("output", value.name, known[value]) for value in graph.outputs]
    return Counter(nodes)


if __name__ == "__main__":
    main()
