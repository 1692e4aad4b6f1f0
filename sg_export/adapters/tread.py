"""Checkpoints of CompVis/tread (`dit.py`, commit fccf77c): class-conditional DiTs, some of whose blocks tokens bypass.

Conventions, from upstream's code: a route from block `start_layer_idx` to `end_layer_idx`, both included; kept tokens
N - int(N * sparsity) (`routing_module.py`, `Router.get_mask`); the null class is the last embedding row; times are
embedded as given, t in [0, 1] for rectified flow (`rf.py`) and ln(sigma) / 4 for EDM (`edm.py`).
"""

import torch

from sg_export.adapters import dit
from sg_export.checkpoint import Checkpoint, Overrides, merge_facts
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import ModelFacts, Route

FAMILY: str = "tread"
KEYS: tuple[str, ...] = (
    "x_embedder.proj.weight",
    "pos_embed",
    "t_embedder.mlp.0.weight",
    dit.LABELS,
    "blocks.0.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.weight",
)


def kept_count(tokens: int, sparsity: float) -> int:
    """Tokens that a branch keeps: N - int(N * sparsity)."""
    return tokens - int(tokens * sparsity)


def usual_route(depth: int) -> Route:
    """From block 2 to the fifth from the end, as published: 2-8 of 12 blocks, 2-24 of 28 (arXiv 2501.04765)."""
    return Route(min(2, depth - 1), max(depth - 4, min(2, depth - 1)))


def build(checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
    """Make the network of a checkpoint, in evaluation mode, and state its facts.

    Raises CheckpointError for tensors that are missing, unknown or of another shape; UsageError for facts that the
    tensors do not tell and nobody gave.
    """
    file, given = checkpoint.source.file, merge_facts(checkpoint, overrides)
    config = infer_config(checkpoint, given.heads)
    route, prediction = given.route, given.prediction
    if route is not None and route.end >= config.depth:
        raise UsageError(f"{file}: route {route}: expected blocks 0 to {config.depth - 1}")
    if prediction is None:
        hint = " (its names carry the prefix of upstream's EDM wrapper)" if "model." in checkpoint.prefix else ""
        raise UsageError(f"{file}: the prediction type is unknown{hint}: give --prediction flow or --prediction edm")
    with torch.device("meta"):
        network = DiT(config)
    return dit.assemble(checkpoint, FAMILY, network, prediction, route, route or Route(0, config.depth - 1))


def infer_config(checkpoint: Checkpoint, heads: int | None) -> DiTConfig:
    """The network's shape from its tensors. `heads`: where they are not upstream's for that width."""
    file = checkpoint.source.file
    width = dit.shape_of(checkpoint, "x_embedder.proj.weight", "D", "C", "P", "P")[0]
    rows, columns = dit.shape_of(checkpoint, dit.LABELS, "classes + 1", "D")
    if rows == width != columns:
        raise CheckpointError(
            f"{file}: {dit.LABELS}: expected (classes + 1, {width}), found {(rows, columns)}, the form of a MaskDiT; "
            f"one without decoder_layer.linear.weight, so without a decoder, is not supported"
        )
    if rows < 2:
        raise CheckpointError(f"{file}: {dit.LABELS}: expected a class and the null, found one row")
    return dit.infer_config(checkpoint, rows - 1, heads, dit.HEADS)
