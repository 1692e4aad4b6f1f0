"""Print the costs of graphs of SiT-XL/2 for one image as JSON, by name: a script that `test_cost.py` runs.

The model is that of arXiv 2601.01608, routed from block 2 to 24, on PyTorch's meta device: no weight is ever made.

    python tests/sg_export/xl_costs.py condition sparse-128 guided-128-26
"""

import json
import sys
from dataclasses import asdict

import torch

from sg_export.cost import count_cost
from sg_export.graphs import GraphSpec
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_export.trace import DEFAULT_OPSET, trace
from sg_runtime.manifest import Cost, Level, ModelFacts, Route

XL = DiTConfig(image_size=32, patch=2, channels=4, width=1152, depth=28, heads=16, mlp_width=4608, num_classes=1000)
ROUTE = Route(2, 24)


def cost(name: str) -> Cost:
    """Trace the graph `name` and count."""
    kind, *keep = name.split("-")
    levels = tuple(Level(1 - int(count) / XL.tokens, int(count)) for count in keep)
    with torch.device("meta"):
        network = DiT(XL)
    facts = ModelFacts(
        family="tread",
        prediction="flow",
        space="latent",
        image_size=XL.image_size,
        channels=XL.channels,
        patch=XL.patch,
        tokens=XL.tokens,
        width=XL.width,
        depth=XL.depth,
        heads=XL.heads,
        num_classes=XL.num_classes,
        modulations=network.modulations,
        parameters=sum(tensor.numel() for tensor in network.state_dict().values()),
        route=ROUTE,
        class_names=None,
    )
    model = SparseModel(network, ROUTE).eval().requires_grad_(False)
    spec = GraphSpec(kind, levels)  # type: ignore[arg-type]
    return count_cost(trace(model, spec, facts, 1, DEFAULT_OPSET).graph)


if __name__ == "__main__":
    print(json.dumps({name: asdict(cost(name)) for name in sys.argv[1:]}))
