"""PRX networks of published shapes, with random weights or without memory for weights.

Shapes, sizes and names are those of Photoroom's models and training code, as diffusers 0.42.1 loads
them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sg_export.adapters import prx
from sg_export.checkpoint import Checkpoint, CheckpointFacts, Overrides
from sg_export.models.prx import PRX, PRXConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import ModelFacts, Route, Source

CONTEXT = 2304
"""Size of a text embedding."""

PIXELS = {16: 8, 32: 32}
"""Side of the square of pixels that one latent decodes to, by channels: flux VAE and DC-AE."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A network for one size of picture. Heads have 64 values.

    picture: height and width of the square picture, in pixels.
    channels: channels of a latent, a key of `PIXELS`.
    patch: side of a patch, in latents.
    text_tokens: number of tokens of a prompt, with padding.
    route: blocks that run on the kept tokens.
    """

    picture: int
    channels: int
    patch: int
    width: int
    depth: int
    text_tokens: int
    route: Route

    @property
    def config(self) -> PRXConfig:
        """The network's configuration. The hidden size of an MLP is 3.5 times the width."""
        side = self.picture // PIXELS[self.channels]
        return PRXConfig(
            image_size=(side, side),
            patch=self.patch,
            channels=self.channels,
            width=self.width,
            depth=self.depth,
            heads=self.width // 64,
            mlp_width=self.width * 7 // 2,
            context=CONTEXT,
            text_tokens=self.text_tokens,
        )

    @property
    def overrides(self) -> Overrides:
        """What a checkpoint does not state."""
        return Overrides(route=self.route, size=(self.picture, self.picture), text_tokens=self.text_tokens)

    @property
    def transformer(self) -> dict[str, Any]:
        """Arguments of diffusers' `PRXTransformer2DModel`."""
        return {
            "in_channels": self.channels,
            "patch_size": self.patch,
            "context_in_dim": CONTEXT,
            "hidden_size": self.width,
            "mlp_ratio": 3.5,
            "num_heads": self.width // 64,
            "depth": self.depth,
            "axes_dim": [32, 32],
        }


def published(picture: int, channels: int = 16, depth: int = 16) -> Shape:
    """Return the shape of the published latent models, of 1.2 billion parameters with 16 blocks.

    The route is the recipe's, 2-12 for 16 blocks. depth: number of blocks, at least 4.
    """
    route = Route(2, depth - 4) if depth > 6 else Route(1, depth - 2)
    return Shape(picture, channels, 2 if channels == 16 else 1, 1792, depth, 256, route)


SMALL = Shape(picture=256, channels=16, patch=2, width=384, depth=12, text_tokens=64, route=Route(2, 9))
"""A network of size S: 256 image tokens and 64 text tokens."""


def without_memory(shape: Shape) -> tuple[SparseModel, ModelFacts]:
    """Return the model and its facts. Each weight is one number, seen as a tensor of its shape."""
    with torch.device("meta"):
        network = PRX(shape.config)
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in network.state_dict().items()}
    return prx.build(Checkpoint(Source("random", "", "bare", None), tensors, CheckpointFacts(), ""), shape.overrides)


def write_folder(shape: Shape, folder: Path) -> Path:
    """Write a diffusers folder of the pipeline with random weights, all nonzero, and return it."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = PRX(shape.config)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).mul_(0.02).add_(name.endswith(NORMS))
        for name, tensor in network.state_dict().items()
    }
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "PRXPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "PRXTransformer2DModel"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
        "transformer/config.json": {"_class_name": "PRXTransformer2DModel", **shape.transformer},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


NORMS = ("norm_q.weight", "norm_k.weight", "norm_added_k.weight")
"""Ends of the names of weights around 1. All others are around 0."""
