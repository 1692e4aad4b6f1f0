"""The network of Anima-Lab/MaskDiT.

Its encoder runs on the kept tokens only, its decoder on all tokens. Module names are as in
upstream's `models/maskdit.py` (commit 73cfb96). The layer between encoder and decoder is the last
layer of the route: it runs on the kept tokens and projects them to the decoder's width.
"""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from sg_export.models.branches import Branches
from sg_export.models.dit import Block, DiT, DiTConfig, FinalLayer, Modulated, modulate

DECODER_WIDTH = 512
DECODER_DEPTH = 8
DECODER_HEADS = 16


class OneHotEmbedder(nn.Module):
    """A linear map of one-hot classes.

    Index `num_classes` is "no class". Its one-hot vector and its embedding are zero.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Linear(num_classes, width, bias=False)

    def forward(self, classes: Tensor) -> Tensor:
        """Embed classes: classes (S,) int64 → (S, D)."""
        known = torch.arange(self.embedding_table.in_features, device=classes.device)
        return self.embedding_table((classes[:, None] == known).to(self.embedding_table.weight.dtype))


class DecoderLayer(Modulated):
    """Modulated LayerNorm and the linear map from the encoder's width to the decoder's."""

    def __init__(self, width: int, decoder_width: int) -> None:
        super().__init__(width, ("shift", "scale"), None)
        self.norm_decoder = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, decoder_width)

    def forward(self, x: Tensor, branches: Branches) -> Tensor:
        """Project packed tokens: x (B, R, D) → (B, R, decoder width)."""
        shift, scale = branches.vectors(2)
        return self.linear(branches.each(modulate, self.norm_decoder(x), shift, scale))


class MaskDiT(DiT):
    """A DiT with a decoder. After the route, the mask token replaces the dropped tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width = config.width
        mlp_width = config.mlp_width * DECODER_WIDTH // width
        self.y_embedder = OneHotEmbedder(config.num_classes, width)
        self.decoder_layer = DecoderLayer(width, DECODER_WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, config.tokens, DECODER_WIDTH), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(DECODER_WIDTH, DECODER_HEADS, mlp_width, width) for _ in range(DECODER_DEPTH)
        )
        self.final_layer = FinalLayer(DECODER_WIDTH, config.patch**2 * config.channels, width)

    @property
    def mask(self) -> Tensor | None:
        """Mask token that replaces dropped tokens, (1, 1, decoder width)."""
        return self.mask_token

    @property
    def stack(self) -> list[Modulated]:
        """Encoder blocks, the layer between encoder and decoder, decoder blocks."""
        return [*self.blocks, self.decoder_layer, *self.decoder_blocks]

    def layer(self, index: int, tokens: Tensor, branches: Branches) -> Tensor:
        """Run layer `index` on packed tokens (B, R, D).

        The first decoder block first adds the decoder's position embedding.
        """
        if index == self.config.depth + 1:
            tokens = tokens + branches.at(self.decoder_pos_embed)
        return super().layer(index, tokens, branches)

    def layer_kind(self, index: int) -> Hashable:
        """Return the kind of a layer.

        There are four kinds: the encoder blocks, the layer between encoder and decoder, the first
        decoder block, the other decoder blocks.
        """
        between = self.config.depth
        return "encoder" if index < between else min(index - between, 2)
