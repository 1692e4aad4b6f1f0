"""Checkpoints of Anima-Lab/MaskDiT (`models/maskdit.py`, commit 73cfb96): DiTs whose encoder sees kept tokens alone.

Conventions, from upstream's code: all of the encoder is the route, and a decoder sees the mask token for what was left
out, zeros where there is none; kept tokens int(N * (1 - sparsity)) (`get_mask`); no class is the zero vector; the
prediction is EDM's, at times ln(sigma) / 4 (`EDMPrecond`). Upstream masks in training alone; here every branch with a
sparsity does.
"""

from dataclasses import replace

import torch

from sg_export.adapters import dit
from sg_export.checkpoint import Checkpoint, Overrides, merge_facts
from sg_export.models.maskdit import DECODER_WIDTH, MaskDiT
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import ModelFacts, Route

FAMILY: str = "maskdit"
DECODER = "decoder_layer.linear.weight"
KEYS: tuple[str, ...] = (DECODER,)
HEADS = {**dit.HEADS, 1280: 16}
"""Heads by width of S, B, L, XL and upstream's H."""

VARIANTS = {
    "cls_token": "a class token (pad_cls_token)",
    "cls_token_embedder.weight": "conditioning on the class token (pad_cls_token)",
    "feat_embedder.weight": "conditioning on external features (ext_feature_dim)",
    "enc_feat_embedder.weight": "conditioning on the encoder's output (use_encoder_feat, self_cond)",
}
"""What is not supported, by the tensor that tells."""


def kept_count(tokens: int, sparsity: float) -> int:
    """Tokens that a branch keeps: int(N * (1 - sparsity))."""
    return int(tokens * (1 - sparsity))


def usual_route(depth: int) -> Route:
    """The whole encoder: there is no other."""
    return Route(0, depth - 1)


def build(checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
    """Make the network of a checkpoint, in evaluation mode, and state its facts.

    Raises CheckpointError for tensors that are missing, unknown or of another shape, and for variants that are not
    supported; UsageError for facts that are not the family's, or that the tensors do not tell and nobody gave.
    """
    file, tensors, given = checkpoint.source.file, checkpoint.tensors, merge_facts(checkpoint, overrides)
    for name, meaning in VARIANTS.items():
        if name in tensors:
            raise CheckpointError(
                f"{file}: {name}: expected none, found one: {meaning}, which is not supported; take a checkpoint that "
                f"was trained without it"
            )
    if dit.LABELS not in tensors:
        raise CheckpointError(
            f"{file}: {dit.LABELS}: expected (D, classes), found none: a model without classes, which is not "
            f"supported; take one that was trained with num_classes above 0"
        )
    decoder_width = dit.shape_of(checkpoint, DECODER, str(DECODER_WIDTH), "D")[0]
    if decoder_width != DECODER_WIDTH:
        raise CheckpointError(
            f"{file}: {DECODER}: expected {DECODER_WIDTH} rows, found {decoder_width}: a decoder of another width than "
            f"upstream's, which is not supported"
        )
    num_classes = dit.shape_of(checkpoint, dit.LABELS, "D", "classes")[1]
    config = dit.infer_config(checkpoint, num_classes, given.heads, HEADS)
    route = usual_route(config.depth)
    if given.route not in (None, route):
        raise UsageError(
            f"{file}: route {given.route}: expected {route}, the whole encoder, as masking has it: leave out the route"
        )
    if given.prediction not in (None, "edm"):
        raise UsageError(
            f"{file}: prediction {given.prediction}: expected edm, as all of this family: leave out the prediction"
        )
    with torch.device("meta"):
        network = MaskDiT(config)
    # Trained without the loss on masked patches, a model has no mask token of its own.
    zeros = {"mask_token": torch.zeros(1, 1, DECODER_WIDTH)}
    complete = replace(checkpoint, tensors={**zeros, **tensors})
    # One layer more than the encoder's blocks: the one that leads to the decoder is on the kept tokens, too.
    return dit.assemble(complete, FAMILY, network, "edm", route, Route(0, config.depth))
