"""The DiT of CompVis/tread, written for export: conditioning apart from the step, no control flow, no randomness.

Module names are those of upstream's `dit.py` (commit fccf77c), so that its state dicts load as they are.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 128
"""Cosines (and as many sines) of the timestep embedding."""


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """Shape of a DiT. `image_size` counts the sampled pixels or latents along one side, which is square."""

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
        """N, the number of tokens of one image."""
        return (self.image_size // self.patch) ** 2


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D) tokens with one qkv projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around the tanh form of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift; x (B, N, D), shift and scale (B, 1, D)."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Transformer block with adaLN-zero modulation, computed outside: `forward` takes its six vectors."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, N, D), modulation (B, 6 * D) → (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map from tokens to patches."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, normed: Tensor, modulation: Tensor) -> Tensor:
        """normed (B, N, D) after `norm_final`, modulation (B, 2 * D) → (B, N, patch * patch * C)."""
        shift, scale = modulation.unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(normed, shift, scale))


class TimestepEmbedder(nn.Module):
    """Sinusoids of t (cosines first), then a two-layer MLP. `t` is used as given, without scaling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (S,) → (S, D)."""
        steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) / FREQUENCIES * steps)
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class LabelEmbedder(nn.Module):
    """One row per class; the last row, index `num_classes`, means "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, classes: Tensor) -> Tensor:
        """classes (S,) int64 → (S, D)."""
        return self.embedding_table(classes)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, in row-major order."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """A class-conditional DiT in the parts of `sg_export.models.sparse.Network`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.depth = config.depth
        self.modulations = (6 * config.depth + 2) * width
        self.x_embedder = PatchEmbed(config.channels, config.patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_width) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch**2 * config.channels)

    def condition(self, t: Tensor, classes: Tensor) -> Tensor:
        """All that the step needs of time and class.

        t (S,) float32, classes (S,) int64 → (S, 6 * D * depth + 2 * D): six vectors per block, then two of the head.
        """
        c = self.t_embedder(t) + self.y_embedder(classes)
        layers = [block.adaLN_modulation for block in self.blocks] + [self.final_layer.adaLN_modulation]
        return torch.cat([layer(c) for layer in layers], dim=-1)

    def embed(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → tokens (B, N, D)."""
        return self.x_embedder(x) + self.pos_embed

    def block(self, index: int, tokens: Tensor, modulations: Tensor) -> Tensor:
        """Block `index` on tokens (B, K, D) with its slice of modulations (B, M)."""
        size = 6 * self.config.width
        return self.blocks[index](tokens, modulations[:, index * size : (index + 1) * size])

    def norm(self, tokens: Tensor) -> Tensor:
        """The last LayerNorm: tokens (B, N, D) → (B, N, D)."""
        return self.final_layer.norm_final(tokens)

    def head(self, normed: Tensor, modulations: Tensor) -> Tensor:
        """normed (B, N, D), modulations (B, M) → prediction (B, C, H, W). Affine in `normed`."""
        c = self.config
        patches = self.final_layer(normed, modulations[:, -2 * c.width :])
        side = c.image_size // c.patch
        grid = patches.reshape(-1, side, side, c.patch, c.patch, c.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.channels, c.image_size, c.image_size)
