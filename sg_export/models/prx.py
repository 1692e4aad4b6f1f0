"""The text-to-image transformer PRX, written for export.

Text enters only as keys and values of attention. They do not depend on time or image, so `prompt`
computes those of all blocks once. Module names and formulas are as in `PRXTransformer2DModel`
(diffusers 0.42.1, `transformer_prx.py`), so its state dicts load unchanged.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sg_export.models.branches import Branches, Place, join
from sg_export.models.dit import FREQUENCIES, AdaLNNetwork, FinalLayer, modulate
from sg_export.models.rope import rope_table, rotate

ENDS = ("img_in", "time_in", "txt_in", "resolution_embedder", "final_layer.linear")
"""Embedders and head, in FP32: no later layer corrects their rounding, and they cost little."""

EPSILON = 1e-6
"""Added to the variance by all norms."""

THETA = 10000.0
"""Base of the frequencies of RoPE."""

TIME_FACTOR = 1000.0
"""Factor on the time in [0, 1]."""

PERIOD = 10000.0
"""Ratio of the highest to the lowest frequency of the sinusoids of time and resolution."""

PADDED = -1e4
"""Score of a padded text token relative to its own.

Its weight after Softmax is exactly 0 in FP32 and FP16 as long as scores are below 4900. A score is
at most √(head size) times two weights of the norms, as queries and keys are normalised.
"""


@dataclass(frozen=True, slots=True)
class PRXConfig:
    """Shape of a PRX network.

    image_size: height and width of the sampled image, in pixels or latents; multiples of the patch.
    patch: height and width of a patch.
    channels: channels of the sampled image.
    width: D, the size of a token.
    depth: number of blocks.
    heads: attention heads of a block. RoPE encodes the row in the first half of a head, and the
    column in the second.
    mlp_width: hidden size of a block's MLP.
    context: size of a text embedding.
    text_tokens: L, number of tokens of a prompt with its padding.
    bottleneck: size between the two linear maps of a patch to a token; None for one linear map.
    resolution: whether height and width are part of the condition.
    """

    image_size: tuple[int, int]
    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    context: int
    text_tokens: int
    bottleneck: int | None = None
    resolution: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def tokens(self) -> int:
        """Number of image tokens, N."""
        return math.prod(self.grid)


class HeadNorm(nn.Module):
    """RMSNorm of each head. The division is the form that ONNX Runtime fuses into one kernel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise heads: x (B, R, heads, d) → (B, R, heads, d)."""
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * self.weight


class Attention(nn.Module):
    """Attention from the image tokens of each branch to the text and to the same image tokens.

    Queries and keys are normalised. RoPE applies to the image alone.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.img_qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.txt_kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.norm_q, self.norm_k, self.norm_added_k = (HeadNorm(width // heads) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the normed keys and the values of the text: (B, L, D) → (B, L, D) each."""
        keys, values = self.txt_kv_proj(text).chunk(2, dim=-1)
        return self.norm_added_k(self._by_head(keys)).flatten(2), values

    def forward(self, x: Tensor, branches: Branches, rows: Tensor) -> Tensor:
        """Attend within each branch: x (B, R, D) → (B, R, D).

        rows: rotations of the packed tokens, (1 or B, R, 2d).
        """
        query, key, value = self.img_qkv_proj(x).chunk(3, dim=-1)
        query = rotate(self.norm_q(self._by_head(query)), rows).flatten(2)
        key = rotate(self.norm_k(self._by_head(key)), rows).flatten(2)
        parts = zip(branches, *(branches.split(packed) for packed in (query, key, value)), strict=True)
        return self.to_out[0](join([self._attend(branch.held, *own) for branch, *own in parts]))

    def _attend(self, held: Mapping[str, Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys = torch.cat([held["text_keys"], key], dim=1)
        values = torch.cat([held["text_values"], value], dim=1)
        bias = F.pad(held["text_bias"].to(query.dtype), (0, key.shape[1]))[:, None, None]
        q, k, v = (self._by_head(tokens).transpose(1, 2) for tokens in (query, keys, values))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]


class Modulation(nn.Module):
    """The linear map from the condition to a block's modulations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, 6 * width)

    def forward(self, active: Tensor) -> Tensor:
        """Compute the modulations: SiLU of the condition (S, D) → (S, 6D).

        They are shift, scale and gate, of the attention and of the MLP. A scale s is returned as
        1 + s, so that no step has to add 1.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.lin(active).chunk(6, dim=-1)
        return torch.cat([shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2], dim=-1)


class Block(nn.Module):
    """Transformer block with adaLN-zero modulation and a gated MLP. Its linear maps have no bias.

    modulations: size of the block's modulations.
    """

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.modulations = 6 * width
        self.img_pre_norm = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.attention = Attention(width, heads)
        self.post_attention_layernorm = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.gate_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)
        self.modulation = Modulation(width)

    def text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the normed keys and the values of the text: (B, L, D) → (B, L, D) each."""
        return self.attention.text(text)

    def forward(self, x: Tensor, branches: Branches, rows: Tensor) -> Tensor:
        """Run the block on packed tokens: x (B, R, D), rows (1 or B, R, 2d) → (B, R, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = branches.vectors(6)
        y = self.attention(branches.each(modulate, self.img_pre_norm(x), shift1, scale1), branches, rows)
        x = x + branches.each(torch.mul, y, gate1)
        y = branches.each(modulate, self.post_attention_layernorm(x), shift2, scale2)
        y = self.down_proj(F.gelu(self.gate_proj(y), approximate="tanh") * self.up_proj(y))
        return x + branches.each(torch.mul, y, gate2)


def sinusoids(values: Tensor, frequencies: int, factor: float = 1.0) -> Tensor:
    """Embed numbers: values (S,) float32 → (S, 2 * frequencies), cosines first.

    Frequency k is factor * PERIOD^(-k / frequencies). The order of the products is upstream's: at
    an angle of 1000, one rounding changes a cosine by up to 6e-5.
    """
    steps = torch.arange(frequencies, dtype=torch.float32, device=values.device)
    angles = factor * (values[:, None] * torch.exp(-math.log(PERIOD) / frequencies * steps))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    """Two linear maps around SiLU, from sinusoids to the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(2 * FREQUENCIES, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, waves: Tensor) -> Tensor:
        """Embed sinusoids: waves (S, 2 * FREQUENCIES) → (S, D)."""
        return self.out_layer(F.silu(self.in_layer(waves.to(self.in_layer.weight.dtype))))


class ResolutionEmbedder(nn.Module):
    """Embedding of the height and width of the sampled image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = Embedder(width)

    def forward(self, resolution: Tensor) -> Tensor:
        """Embed a resolution: (2,) float32, height and width → (1, D)."""
        return self.mlp(sinusoids(resolution, FREQUENCIES // 2).view(1, -1))


def text_bias(mask: Tensor) -> Tensor:
    """Return what is added to the scores of text tokens: mask (B, L), 0 for padding → (B, L).

    The result is float32: 0 for a token, `PADDED` for padding.
    """
    return (mask == 0).float() * PADDED


class PRX(AdaLNNetwork):
    """A text-conditional PRX, an implementation of `sg_export.models.sparse.Network`.

    Dropped tokens bypass the route. In every block they are no keys either. Branches hold, for all
    layers, `modulations` (B, M), `text_keys` and `text_values`, (B, depth, L, D), and `text_bias`
    (B, L).

    rope: rotations of the N image tokens, (N, 2 * head size) float32.
    """

    rope: Tensor

    def __init__(self, config: PRXConfig) -> None:
        super().__init__()
        self.config = config
        width, values = config.width, config.channels * config.patch**2
        self.img_in: nn.Module = nn.Linear(values, width)
        if config.bottleneck is not None:
            self.img_in = nn.Sequential(nn.Linear(values, config.bottleneck), nn.Linear(config.bottleneck, width))
        self.time_in = Embedder(width)
        self.txt_in = nn.Linear(config.context, width)
        self.resolution_embedder = ResolutionEmbedder(width) if config.resolution else None
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_width) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, values)
        axis = width // config.heads // 2
        with torch.device("cpu"):  # not on the meta device: a checkpoint does not hold its values
            self.register_buffer("rope", rope_table(config.grid, (axis, axis), THETA), persistent=False)

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of the modules that stay in FP32."""
        return ENDS

    @property
    def held(self) -> dict[str, tuple[int, ...]]:
        """Shape, for one image, of the tensors that do not change within a step, by name."""
        c = self.config
        text = (c.depth, c.text_tokens, c.width)
        return {"modulations": (self.modulations,), "text_keys": text, "text_values": text, "text_bias": text[1:2]}

    @property
    def hoisted(self) -> dict[str, tuple[str, ...]]:
        """Arguments of the methods that compute the held tensors."""
        return {"condition": ("t",), "prompt": ("embeddings", "mask")}

    @property
    def sized(self) -> tuple[str, ...]:
        """Methods that compute held tensors which depend on the size of the image."""
        return ("condition",) if self.config.resolution else ()

    def condition(self, t: Tensor) -> Tensor:
        """Compute the modulations of all layers: t (S,) float32, 1 for noise → (S, M)."""
        condition = self.time_in(sinusoids(t, FREQUENCIES, TIME_FACTOR))
        if self.resolution_embedder is not None:
            resolution = torch.tensor(self.config.image_size, dtype=torch.float32, device=t.device)
            condition = condition + self.resolution_embedder(resolution)
        return self.all_modulations(F.silu(condition))

    def prompt(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the normed keys and the values of the text in all blocks, and the text's bias.

        embeddings (S, L, context), mask (S, L), 0 for padding → text_keys and text_values,
        (S, depth, L, D) each, and text_bias (S, L) float32.
        """
        text = self.txt_in(embeddings.to(self.txt_in.weight.dtype))
        keys, values = zip(*(block.text(text) for block in self.blocks), strict=True)
        return torch.stack(keys, dim=1), torch.stack(values, dim=1), text_bias(mask)

    def embed(self, x: Tensor) -> Tensor:
        """Embed images: x (B, C, H, W) → tokens (B, N, D), row by row."""
        c, (rows, columns) = self.config, self.config.grid
        patches = x.reshape(-1, c.channels, rows, c.patch, columns, c.patch).permute(0, 2, 4, 1, 3, 5)
        return self.img_in(patches.reshape(-1, c.tokens, c.channels * c.patch**2))

    def layer(self, index: int, tokens: Tensor, branches: Branches) -> Tensor:
        """Run block `index` on packed tokens: (B, R, D) → (B, R, D)."""
        return self.blocks[index](tokens, branches, branches.at(self.rope))

    def layer_inputs(self, index: int) -> dict[str, Place]:
        """Return layer `index`'s part of the held tensors, by name. All layers share "text_bias".

        Index `layers` is the final layer.
        """
        places = super().layer_inputs(index)
        return places if index == self.layers else {**places, "text_keys": index, "text_values": index}

    def layer_name(self, index: int) -> str:
        """Return the name of a block, the prefix of its weights' names."""
        return f"blocks.{index}"

    def project(self, tokens: Tensor) -> Tensor:
        """Map tokens to the output: tokens (B, N, D) → output (B, C, H, W)."""
        c, (rows, columns) = self.config, self.config.grid
        patches = self.final_layer.linear(tokens).reshape(-1, rows, columns, c.channels, c.patch, c.patch)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, c.channels, *c.image_size)
