"""Adapter of Anima-Lab/MaskDiT checkpoints (`models/maskdit.py`, commit 73cfb96).

They are DiTs whose encoder runs on the kept tokens only. Conventions, from upstream's code:

* The entire encoder is the route.
* The decoder gets the mask token for each dropped token. If the checkpoint has no mask token, it
  gets zeros.
* A branch keeps int(N * (1 - sparsity)) tokens (`get_mask`).
* "No class" is the zero vector.
* The prediction is EDM's, at times ln(sigma) / 4 (`EDMPrecond`).

Upstream masks only in training. Here every branch with a sparsity masks.
"""

from dataclasses import replace

import torch

from sg_export.adapters import dit
from sg_export.checkpoint import Checkpoint, Overrides, merge_facts
from sg_export.models.maskdit import DECODER_WIDTH, MaskDiT
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import ModelFacts, Route, Sampling
from sg_runtime.manifest.model import KEPT

FAMILY: str = "maskdit"
DECODER = "decoder_layer.linear.weight"
KEYS: tuple[str, ...] = (DECODER,)
PREFIXES: tuple[str, ...] = ("",)
HEADS = {**dit.HEADS, 1280: 16}
"""Number of heads by width, for S, B, L, XL and upstream's H."""

VARIANTS = {
    "cls_token": "a class token (pad_cls_token)",
    "cls_token_embedder.weight": "conditioning on the class token (pad_cls_token)",
    "feat_embedder.weight": "conditioning on external features (ext_feature_dim)",
    "enc_feat_embedder.weight": "conditioning on the encoder's output (use_encoder_feat, self_cond)",
}
"""Variants that are not supported, by the tensor that identifies them."""


resized = dit.resized


def kept_count(tokens: int, sparsity: float) -> int:
    """Return the number of tokens that a branch keeps: int(N * (1 - sparsity))."""
    return KEPT[FAMILY](tokens, sparsity)


def usual_route(depth: int) -> Route:
    """Return the entire encoder, the only route of this family."""
    return Route(0, depth - 1)


def build(checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
    """Build the network of a checkpoint, in evaluation mode, and return it with its facts.

    Raises CheckpointError for tensors that are missing, unknown or of another shape, and for
    unsupported variants. Raises UsageError for facts that this family does not allow, and for facts
    that neither the tensors nor the user nor the author state.
    """
    file, tensors, given = checkpoint.source.file, checkpoint.tensors, merge_facts(checkpoint, overrides)
    dit.check_given(file, FAMILY, overrides)
    for name, meaning in VARIANTS.items():
        if name in tensors:
            raise CheckpointError(
                f"{file}: {name}: expected none, found one: {meaning}, which is not supported; take a checkpoint that "
                f"was trained without it"
            )
    if dit.LABELS not in tensors:
        raise CheckpointError(
            f"{file}: {dit.LABELS}: expected (D, classes), found none: a model without classes, which is not "
            f"supported; take a checkpoint that was trained with num_classes above 0"
        )
    decoder_width = dit.shape_of(checkpoint, DECODER, str(DECODER_WIDTH), "D")[0]
    if decoder_width != DECODER_WIDTH:
        raise CheckpointError(
            f"{file}: {DECODER}: expected {DECODER_WIDTH} rows, found {decoder_width}: a decoder width other than "
            f"upstream's, which is not supported"
        )
    num_classes = dit.shape_of(checkpoint, dit.LABELS, "D", "classes")[1]
    config = dit.infer_config(checkpoint, num_classes, given.heads, HEADS)
    route = usual_route(config.depth)
    if given.route not in (None, route):
        raise UsageError(f"{file}: route {given.route}: expected {route}, the entire encoder: leave out the route")
    if given.prediction not in (None, "edm"):
        raise UsageError(
            f"{file}: prediction {given.prediction}: expected edm, as in all MaskDiT models: leave out the prediction"
        )
    with torch.device("meta"):
        network = MaskDiT(config)
    # A model that was trained without the loss on masked patches has no mask token.
    zeros = {"mask_token": torch.zeros(1, 1, DECODER_WIDTH)}
    complete = replace(checkpoint, tensors={**zeros, **tensors})
    # The layer between encoder and decoder also runs on the kept tokens: it is part of the route.
    return dit.assemble(complete, FAMILY, network, "edm", route, Route(0, config.depth))


def sampling(checkpoint: Checkpoint, facts: ModelFacts) -> Sampling:
    """Return the default sampling, EDM's."""
    return dit.default_sampling(facts.prediction)
