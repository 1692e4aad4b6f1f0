"""The DiT of CompVis/tread, written for export.

Conditioning is separate from the step. There is no control flow and no randomness. Module names are
as in upstream's `dit.py` (commit fccf77c), so upstream's state dicts load unchanged.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sg_export.models.branches import Branches, Place, join

ENDS = ("x_embedder", "t_embedder", "y_embedder", "final_layer.linear")
"""Embedders and head, in FP32: no later layer corrects their rounding, and they cost little."""

FREQUENCIES = 128
"""Number of cosines of the timestep embedding, and number of its sines."""


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """Shape of a DiT.

    image_size: height and width of the sampled image, in pixels or latents.
    patch: height and width of a patch.
    channels: channels of the sampled image.
    width: D, the size of a token.
    depth: number of blocks.
    heads: attention heads of a block.
    mlp_width: hidden size of a block's MLP.
    num_classes: number of classes, without "no class".
    """

    image_size: int
    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    num_classes: int

    @property
    def tokens(self) -> int:
        """Number of tokens of one image, N."""
        return (self.image_size // self.patch) ** 2


class Attention(nn.Module):
    """Multi-head self-attention within each branch of packed tokens.

    One qkv projection runs on the tokens of all branches.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, branches: Branches) -> Tensor:
        """Attend within each branch: x (B, R, D) → (B, R, D)."""
        return self.proj(join([self._attend(part) for part in branches.split(self.qkv(x))]))

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))  # type: ignore[no-untyped-call]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers around the tanh form of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * scale + shift; x (B, N, D), shift and scale (B, 1, D).

    `Modulated.modulation` has added 1 to the scale.
    """
    return x * scale + shift


class Modulated(nn.Module):
    """A layer with adaLN modulation, computed from the condition outside of the step.

    width: width of the layer, and of each modulation vector.
    vectors: the modulation vectors in order, as "shift", "scale" and "gate".
    condition: width of the condition; `width` if None.
    """

    def __init__(self, width: int, vectors: Sequence[str], condition: int | None) -> None:
        super().__init__()
        self.width = width
        self.vectors = tuple(vectors)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition or width, len(vectors) * width))

    @property
    def modulations(self) -> int:
        """Size of the layer's modulations; those of all layers add up to M."""
        return len(self.vectors) * self.width

    def modulation(self, active: Tensor) -> Tensor:
        """Compute the layer's modulations: SiLU of the condition (S, D) → (S, m).

        A scale s is returned as 1 + s, so that no step has to add 1.
        """
        vectors = zip(self.vectors, self.adaLN_modulation[1](active).chunk(len(self.vectors), dim=-1), strict=True)
        return torch.cat([1 + vector if name == "scale" else vector for name, vector in vectors], dim=-1)


class Block(Modulated):
    """Transformer block with adaLN-zero modulation.

    condition: width of the condition; `width` if None.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, condition: int | None = None) -> None:
        super().__init__(width, 2 * ("shift", "scale", "gate"), condition)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x: Tensor, branches: Branches) -> Tensor:
        """Run the block on packed tokens: x (B, R, D) → (B, R, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = branches.vectors(6)
        y = self.attn(branches.each(modulate, self.norm1(x), shift1, scale1), branches)
        x = x + branches.each(torch.mul, y, gate1)
        y = self.mlp(branches.each(modulate, self.norm2(x), shift2, scale2))
        return x + branches.each(torch.mul, y, gate2)


class FinalLayer(Modulated):
    """Modulated LayerNorm and the linear map from tokens to patches.

    It has no `forward`: `DiT.norm`, `DiT.modulate` and `DiT.project` run its parts.
    """

    def __init__(self, width: int, patch_values: int, condition: int | None = None) -> None:
        super().__init__(width, ("shift", "scale"), condition)
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_values)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t (cosines first), then a two-layer MLP. `t` is not scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times: t (S,) → (S, D)."""
        steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) / FREQUENCIES * steps)
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embedding table with one row per class. The last row, index `num_classes`, is "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, classes: Tensor) -> Tensor:
        """Embed classes: classes (S,) int64 → (S, D)."""
        return self.embedding_table(classes)


class PatchEmbed(nn.Module):
    """Linear map from non-overlapping patches to tokens, in row-major order.

    It is computed as a matmul, which needs no cuDNN on a GPU. The weight is that of a convolution,
    (D, C, P, P), as upstream's.
    """

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches: x (B, C, H, W) → (B, N, D)."""
        (_, channels, height, width), p = x.shape, self.proj.kernel_size[0]
        patches = x.reshape(-1, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, (height // p) * (width // p), channels * p * p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class AdaLNNetwork(nn.Module):
    """The members of `sg_export.models.sparse.Network` that all networks with adaLN layers share.

    Dropped tokens bypass the route.
    """

    final_layer: FinalLayer

    @property
    def sized(self) -> tuple[str, ...]:
        """Methods that compute held tensors which depend on the size of the image: none."""
        return ()

    @property
    def mask(self) -> Tensor | None:
        """Return None: dropped tokens bypass the route."""
        return None

    @property
    def stack(self) -> list[Any]:
        """Layers in order, without the final layer."""
        return [*self.blocks]  # type: ignore[misc]  # a ModuleList

    @property
    def layers(self) -> int:
        """Number of layers, without the final layer."""
        return len(self.stack)

    @property
    def modulations(self) -> int:
        """Size of all modulations, M.

        The modulations of the layers come in order, followed by the final layer's modulations.
        """
        return sum(layer.modulations for layer in [*self.stack, self.final_layer])

    def all_modulations(self, active: Tensor) -> Tensor:
        """Compute the modulations of all layers: SiLU of the condition (S, D) → (S, M)."""
        return torch.cat([layer.modulation(active) for layer in [*self.stack, self.final_layer]], dim=-1)

    def layer_inputs(self, index: int) -> dict[str, Place]:
        """Return the slice of M that holds the modulations of layer `index`, by name.

        Index `layers` is the final layer.
        """
        layers = [*self.stack, self.final_layer]
        start = sum(layer.modulations for layer in layers[:index])
        return {"modulations": slice(start, start + layers[index].modulations)}

    def layer_kind(self, index: int) -> Hashable:
        """Return the same kind for all blocks."""
        return "block"

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the last LayerNorm: tokens (B, R, D) → (B, R, D)."""
        return self.final_layer.norm_final(tokens)

    def modulate(self, normed: Tensor, branches: Branches) -> Tensor:
        """Apply the last modulation: normed (B, R, D) → (B, R, D)."""
        shift, scale = branches.of(self.layer_inputs(self.layers)).vectors(2)
        return branches.each(modulate, normed, shift, scale)


class DiT(AdaLNNetwork):
    """A class-conditional DiT, an implementation of `sg_export.models.sparse.Network`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.channels, config.patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder: nn.Module = LabelEmbedder(config.num_classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_width) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch**2 * config.channels)

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of the modules that stay in FP32."""
        return ENDS

    @property
    def held(self) -> dict[str, tuple[int, ...]]:
        """Shape of the modulations of one image, by name."""
        return {"modulations": (self.modulations,)}

    @property
    def hoisted(self) -> dict[str, tuple[str, ...]]:
        """Arguments of the methods that compute the held tensors."""
        return {"condition": ("t", "class")}

    def condition(self, t: Tensor, classes: Tensor) -> Tensor:
        """Compute the modulations of all layers: t (S,) float32, classes (S,) int64 → (S, M)."""
        return self.all_modulations(F.silu(self.t_embedder(t) + self.y_embedder(classes)))

    def embed(self, x: Tensor) -> Tensor:
        """Embed images: x (B, C, H, W) → tokens (B, N, D)."""
        return self.x_embedder(x) + self.pos_embed

    def layer(self, index: int, tokens: Tensor, branches: Branches) -> Tensor:
        """Run layer `index` on packed tokens: (B, R, D) → (B, R, D)."""
        return self.stack[index](tokens, branches)

    def layer_name(self, index: int) -> str:
        """Return the name of a layer's module, the prefix of its weights' names."""
        return next(name for name, module in self.named_modules() if module is self.stack[index])

    def project(self, tokens: Tensor) -> Tensor:
        """Map tokens to the output: tokens (B, N, D) → output (B, C, H, W)."""
        c = self.config
        side = c.image_size // c.patch
        patches = self.final_layer.linear(tokens).reshape(-1, side, side, c.patch, c.patch, c.channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.channels, c.image_size, c.image_size)
