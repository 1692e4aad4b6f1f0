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


def costs(names: list[str]) -> dict[str, Cost]:
    """Trace the graphs of these names and count."""
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
    models = trace(model, [spec(name) for name in names], facts, 1, DEFAULT_OPSET)
    return {name: count_cost(model.graph) for name, model in zip(names, models, strict=True)}


def spec(name: str) -> GraphSpec:
    """The graph of this name."""
    kind, *keep = name.split("-")
    levels = tuple(Level(1 - int(count) / XL.tokens, int(count)) for count in keep)
    return GraphSpec(kind, levels)  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps({name: asdict(cost) for name, cost in costs(sys.argv[1:]).items()}))
