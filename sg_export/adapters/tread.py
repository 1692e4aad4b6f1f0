"""Checkpoints of CompVis/tread (`dit.py`, commit fccf77c): class-conditional DiTs, some of whose blocks tokens bypass.

Conventions, from upstream's code: a route from block `start_layer_idx` to `end_layer_idx`, both included; kept tokens
N - int(N * sparsity) (`routing_module.py`, `Router.get_mask`); the null class is the last embedding row; times are
embedded as given, t in [0, 1] for rectified flow (`rf.py`) and ln(sigma) / 4 for EDM (`edm.py`).
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sg_export.checkpoint import Checkpoint, Overrides
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import ModelFacts, Route

FAMILY: str = "tread"
KEYS: tuple[str, ...] = (
    "x_embedder.proj.weight",
    "pos_embed",
    "t_embedder.mlp.0.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.weight",
)
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads by width of upstream's S, B, L and XL."""


def kept(tokens: int, sparsity: float) -> int:
    """Tokens that a branch keeps: N - int(N * sparsity)."""
    return tokens - int(tokens * sparsity)


def build(checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
    """Make the network of a checkpoint, in evaluation mode, and state its facts.

    Raises CheckpointError for tensors that are missing, unknown or of another shape; UsageError for facts that the
    tensors do not tell and nobody gave.
    """
    file, tensors, facts = checkpoint.source.file, checkpoint.tensors, checkpoint.facts
    config = infer_config(file, tensors, facts.heads if overrides.heads is None else overrides.heads)
    route = overrides.route or (Route.parse(facts.route) if facts.route else None)
    if route is not None and route.end >= config.depth:
        raise UsageError(f"{file}: route {route}: expected blocks 0 to {config.depth - 1}")
    prediction = overrides.prediction or facts.prediction
    if prediction is None:
        hint = " (its names carry the prefix of upstream's EDM wrapper)" if "model." in checkpoint.prefix else ""
        raise UsageError(f"{file}: the prediction type is unknown{hint}: give --prediction flow or --prediction edm")
    with torch.device("meta"):
        network = DiT(config)
    _check_tensors(file, tensors, network)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    names = facts.class_names
    if names is not None and len(names) != config.num_classes:
        raise CheckpointError(f"{file}: class_names: expected {config.num_classes} names, found {len(names)}")
    model = SparseModel(network, route or Route(0, config.depth - 1)).eval().requires_grad_(False)
    model_facts = ModelFacts(
        family=FAMILY,
        prediction=prediction,
        space=facts.space or ("pixel" if config.channels in (1, 3) else "latent"),
        image_size=config.image_size,
        channels=config.channels,
        patch=config.patch,
        tokens=config.tokens,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        num_classes=config.num_classes,
        modulations=network.modulations,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        route=route,
        class_names=names,
    )
    return model, model_facts


def infer_config(file: str, tensors: Mapping[str, Tensor], heads: int | None) -> DiTConfig:
    """The network's shape from its tensors. `heads`: where it is not upstream's for that width."""
    absent = [key for key in KEYS if key not in tensors]
    if absent:
        raise CheckpointError(f"{file}: expected the tensors of a {FAMILY} model, but {', '.join(absent)} is missing")

    def shape(name: str, *sizes: str) -> torch.Size:
        found = tensors[name].shape if name in tensors else torch.Size([1] * len(sizes))
        if len(found) != len(sizes) or 0 in found:
            raise CheckpointError(f"{file}: {name}: expected ({', '.join(sizes)}), found {tuple(found)}")
        return found

    width, channels, patch, columns = shape("x_embedder.proj.weight", "D", "C", "P", "P")
    if patch != columns:
        raise CheckpointError(f"{file}: x_embedder.proj.weight: expected square patches, found {patch}×{columns}")
    tokens = shape("pos_embed", "1", "N", "D")[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"{file}: pos_embed: expected (1, N, D) with N a square, found N = {tokens}")
    classes = shape("y_embedder.embedding_table.weight", "classes + 1", "D")[0] - 1
    if classes < 1:
        raise CheckpointError(
            f"{file}: y_embedder.embedding_table.weight: expected a class and the null, found one row"
        )
    # Counted, not the highest number, which a damaged name could make any size.
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.([0-9]+)\.", name))}
    head = shape("final_layer.linear.weight", "rows", "D")[0]
    if head == 2 * patch**2 * channels:
        raise CheckpointError(
            f"{file}: final_layer.linear.weight: expected {patch**2 * channels} rows, found {head}: "
            f"a learn_sigma head, which is not supported; upstream's own samplers do not split it either"
        )
    heads = HEADS.get(width) if heads is None else heads
    if heads is None:
        known = ", ".join(str(width) for width in HEADS)
        raise UsageError(f"{file}: width {width} is none of upstream's ({known}): give --heads")
    if heads < 1 or width % heads:
        raise UsageError(f"{file}: heads: expected a divisor of the width {width}, found {heads}")
    return DiTConfig(
        image_size=side * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=len(blocks),
        heads=heads,
        mlp_width=shape("blocks.0.mlp.fc1.weight", "hidden", "D")[0],
        num_classes=classes,
    )


def usual_route(depth: int) -> Route:
    """From block 2 to the fifth from the end, as published: 2-8 of 12 blocks, 2-24 of 28 (arXiv 2501.04765)."""
    return Route(min(2, depth - 1), max(depth - 4, min(2, depth - 1)))


def _check_tensors(file: str, tensors: Mapping[str, Tensor], network: DiT) -> None:
    expected = network.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        parts = [
            f"{kind} {', '.join(names[:8])}{' …' if len(names) > 8 else ''} ({len(names)})"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{file}: expected the tensors of a {FAMILY} model, found {'; '.join(parts)}")
    for name, wanted in expected.items():
        tensor = tensors[name]
        if tensor.shape != wanted.shape or not tensor.is_floating_point() or tensor.layout != torch.strided:
            layout = "" if tensor.layout == torch.strided else f"{tensor.layout} "
            raise CheckpointError(
                f"{file}: {name}: expected floating point of shape {tuple(wanted.shape)}, "
                f"found {layout}{tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if not tensor.float().isfinite().all():
            raise CheckpointError(
                f"{file}: {name}: expected finite values, found NaN or infinity: the training diverged, or the file is "
                f"damaged; take an earlier checkpoint"
            )
