"""Adapter of CompVis/tread checkpoints (`dit.py`, commit fccf77c).

They are class-conditional DiTs in which dropped tokens bypass some blocks. Conventions, from
upstream's code:

* The route goes from block `start_layer_idx` to block `end_layer_idx`, both included.
* A branch keeps N - int(N * sparsity) tokens (`routing_module.py`, `Router.get_mask`).
* "No class" is the last row of the label embedding.
* Times are embedded without scaling: t in [0, 1] for rectified flow (`rf.py`), ln(sigma) / 4 for
  EDM (`edm.py`).
* `train.py` trains EDM only: it wraps the network by `edm.py`, and so writes the prefix "model." in
  front of every name. `rf.py` has no wrapper.
"""

import logging

import torch

from sg_export.adapters import dit
from sg_export.checkpoint import Checkpoint, Overrides, merge_facts
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import ModelFacts, Route, Sampling
from sg_runtime.manifest.model import KEPT

LOG = logging.getLogger(__name__)

FAMILY: str = "tread"
KEYS: tuple[str, ...] = (
    "x_embedder.proj.weight",
    "pos_embed",
    "t_embedder.mlp.0.weight",
    dit.LABELS,
    "blocks.0.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.weight",
)
PREFIXES: tuple[str, ...] = ("",)


resized = dit.resized


def kept_count(tokens: int, sparsity: float) -> int:
    """Return the number of tokens that a branch keeps: N - int(N * sparsity)."""
    return KEPT[FAMILY](tokens, sparsity)


def usual_route(depth: int) -> Route:
    """Return the published route, from block 2 to the fourth block from the end.

    It is 2-8 for 12 blocks and 2-24 for 28 blocks (arXiv 2501.04765).
    """
    return Route(min(2, depth - 1), max(depth - 4, min(2, depth - 1)))


def build(checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
    """Build the network of a checkpoint, in evaluation mode, and return it with its facts.

    The prefix of upstream's EDM wrapper decides the prediction, unless the user or the author
    states it; a stated flow is then logged as a warning.

    Raises CheckpointError for tensors that are missing, unknown or of another shape. Raises
    UsageError for a route outside of the network, and for facts that neither the tensors nor the
    user nor the author state.
    """
    file, given = checkpoint.source.file, merge_facts(checkpoint, overrides)
    dit.check_given(file, FAMILY, overrides)
    config = infer_config(checkpoint, given.heads)
    wrapped = "model" in checkpoint.prefix.split(".")
    route, prediction = given.route, given.prediction or ("edm" if wrapped else None)
    if route is not None and route.end >= config.depth:
        raise UsageError(f"{file}: route {route}: expected blocks 0 to {config.depth - 1}")
    if prediction is None:
        raise UsageError(
            f"{file}: the prediction type is unknown: give `prediction` flow (velocity noise - data, noise at t = 1) "
            f"or `prediction` edm; SiT's files are neither"
        )
    if prediction == "x0":
        raise UsageError(f"{file}: prediction x0: expected flow or edm, as in all TREAD models")
    if wrapped and prediction == "flow":
        LOG.warning(
            "%s: its names have the prefix of EDM's wrapper, %s, which CompVis/tread's training writes, but its "
            "prediction is stated as flow: if its samples are noise, give `prediction` edm",
            file,
            checkpoint.prefix,
        )
    with torch.device("meta"):
        network = DiT(config)
    return dit.assemble(checkpoint, FAMILY, network, prediction, route, route or Route(0, config.depth - 1))


def sampling(checkpoint: Checkpoint, facts: ModelFacts) -> Sampling:
    """Return the default sampling of flow or of EDM."""
    return dit.default_sampling(facts.prediction)


def infer_config(checkpoint: Checkpoint, heads: int | None) -> DiTConfig:
    """Infer the network's shape from its tensors.

    heads: number of heads; if None, upstream's number for the width. Raises CheckpointError for
    tensors that do not fit together, and UsageError if the number of heads is unknown.
    """
    file = checkpoint.source.file
    width = dit.shape_of(checkpoint, "x_embedder.proj.weight", "D", "C", "P", "P")[0]
    rows, columns = dit.shape_of(checkpoint, dit.LABELS, "classes + 1", "D")
    if rows == width != columns:
        raise CheckpointError(
            f"{file}: {dit.LABELS}: expected (classes + 1, {width}), found {(rows, columns)}, the shape in a MaskDiT; "
            f"a MaskDiT without a decoder (decoder_layer.linear.weight) is not supported"
        )
    if rows < 2:
        raise CheckpointError(f"{file}: {dit.LABELS}: expected rows for a class and for no class, found one row")
    return dit.infer_config(checkpoint, rows - 1, heads, dit.HEADS)
