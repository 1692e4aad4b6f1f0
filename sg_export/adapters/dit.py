"""Shared parts of the adapters: infer the shape from the tensors, and load the model."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sg_export.checkpoint import Checkpoint, Overrides
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import EVEN, Karras, Labels, ModelFacts, Prediction, Route, Sampling

LABELS = "y_embedder.embedding_table.weight"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Number of heads by width, for S, B, L and XL (arXiv 2212.09748, table 1)."""

NOISE_LEVELS = Karras(0.002, 80.0, 7.0)
"""Noise levels of EDM models: the defaults of NVlabs/edm (`generate.py`, `edm_sampler`).

The samplers of both families of DiTs use them.
"""

OF_PROMPTS = ("size", "text_tokens", "channels", "patch", "pixels_per_latent", "time_shift", "noise_scale")
"""Facts that are only about models that are conditioned on text."""

STEPS = 40
"""Default number of steps of DiTs."""


def check_given(file: str, family: str, given: Overrides) -> None:
    """Raise UsageError for facts that are only about models that are conditioned on text."""
    for name in ("size", "text_tokens"):
        if getattr(given, name) is not None:
            raise UsageError(f"{file}: expected no `{name}` for a model of {family}, whose tensors fix it")


def resized(file: str, model: SparseModel, facts: ModelFacts, size: tuple[int, int]) -> tuple[SparseModel, ModelFacts]:
    """Raise UsageError: a model of class labels has one size."""
    check_given(file, facts.family, Overrides(size=size))
    return model, facts


def default_sampling(prediction: Prediction) -> Sampling:
    """Return the default sampling of a DiT."""
    if prediction == "edm":
        return Sampling("heun", STEPS, NOISE_LEVELS)
    return Sampling("euler", STEPS, EVEN)


def shape_of(checkpoint: Checkpoint, name: str, *sizes: str) -> torch.Size:
    """Return the shape of the tensor `name`.

    sizes: names of the expected dimensions, for the error. Raises CheckpointError if there is no
    such tensor, if it has another number of dimensions, or if a dimension is 0.
    """
    tensor = checkpoint.tensors.get(name)
    if tensor is None or tensor.ndim != len(sizes) or 0 in tensor.shape:
        found = "none" if tensor is None else tuple(tensor.shape)
        raise CheckpointError(f"{checkpoint.source.file}: {name}: expected ({', '.join(sizes)}), found {found}")
    return tensor.shape


def infer_config(
    checkpoint: Checkpoint, num_classes: int, heads: int | None, known_heads: Mapping[int, int]
) -> DiTConfig:
    """Infer the network's shape from its tensors.

    num_classes: number of classes, which the family's adapter reads from the label table.
    heads: stated number of heads; if None, it follows from the width by `known_heads`.

    Raises CheckpointError for tensors that do not fit together or are not supported, and UsageError
    if the number of heads is unknown or does not divide the width.
    """
    file, tensors = checkpoint.source.file, checkpoint.tensors
    width, channels, patch, columns = shape_of(checkpoint, "x_embedder.proj.weight", "D", "C", "P", "P")
    if patch != columns:
        raise CheckpointError(f"{file}: x_embedder.proj.weight: expected square patches, found {patch}×{columns}")
    tokens = shape_of(checkpoint, "pos_embed", "1", "N", "D")[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"{file}: pos_embed: expected (1, N, D) with N a square, found N = {tokens}")
    # The names are counted: a damaged name could make the highest number arbitrarily large.
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.([0-9]+)\.", name))}
    rows = shape_of(checkpoint, "final_layer.linear.weight", "rows", "D")[0]
    if rows == 2 * patch**2 * channels:
        raise CheckpointError(
            f"{file}: final_layer.linear.weight: expected {patch**2 * channels} rows, found {rows}: "
            f"a learn_sigma head, as in the published weights of DiT and SiT, which is not supported; take a "
            f"checkpoint that was trained with learn_sigma=False"
        )
    heads = known_heads.get(width) if heads is None else heads
    if heads is None:
        known = ", ".join(str(width) for width in known_heads)
        raise UsageError(f"{file}: width {width} is not one of upstream's ({known}): give `heads`")
    if heads < 1 or width % heads:
        raise UsageError(f"{file}: heads: expected a divisor of the width {width}, found {heads}")
    return DiTConfig(
        image_size=side * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=len(blocks),
        heads=heads,
        mlp_width=shape_of(checkpoint, "blocks.0.mlp.fc1.weight", "hidden", "D")[0],
        num_classes=num_classes,
    )


def assemble(
    checkpoint: Checkpoint, family: str, network: DiT, prediction: Prediction, route: Route | None, layers: Route
) -> tuple[SparseModel, ModelFacts]:
    """Load the checkpoint's tensors into `network`, and return the model with its facts.

    network: a network on the meta device.
    route: blocks that run on the kept tokens; None if they are unknown.
    layers: the same route, counted in the layers of `network`.

    Raises CheckpointError for tensors that are missing, unknown, of another shape or not finite.
    """
    file, tensors, facts, config = checkpoint.source.file, checkpoint.tensors, checkpoint.facts, network.config
    check_tensors(file, family, tensors, network)
    stated = [name for name in OF_PROMPTS if getattr(facts, name) is not None]
    if stated:
        raise CheckpointError(f"{file}: {stated[0]}: expected none for a model of {family}, found one")
    names = facts.class_names
    if names is not None and len(names) != config.num_classes:
        raise CheckpointError(f"{file}: class_names: expected {config.num_classes} names, found {len(names)}")
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    space = facts.space or ("pixel" if config.channels in (1, 3) else "latent")
    model_facts = ModelFacts(
        family=family,
        prediction=prediction,
        space=space,
        latent=(config.channels, config.image_size, config.image_size),
        pixels_per_latent=1 if space == "pixel" else None,
        patch=config.patch,
        tokens=config.tokens,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        conditions=Labels(config.num_classes, names),
        held=network.held,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        route=route,
        ends=network.ends,
        masked=network.mask is not None,
    )
    return SparseModel(network, layers).eval().requires_grad_(False), model_facts


def check_tensors(file: str, family: str, tensors: Mapping[str, Tensor], network: nn.Module) -> None:
    """Raise CheckpointError unless `tensors` are those of the network, float and finite.

    The error names what is missing, unknown, of another shape or not finite.
    """
    expected = network.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        parts = [
            f"{kind} {', '.join(names[:8])}{' …' if len(names) > 8 else ''} ({len(names)})"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{file}: expected the tensors of a {family} model, found {'; '.join(parts)}")
    for name, wanted in expected.items():
        tensor = tensors[name]
        if tensor.shape != wanted.shape or not tensor.is_floating_point() or tensor.layout != torch.strided:
            layout = "" if tensor.layout == torch.strided else f"{tensor.layout} "
            raise CheckpointError(
                f"{file}: {name}: expected a float tensor of shape {tuple(wanted.shape)}, "
                f"found {layout}{tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if not tensor.float().isfinite().all():
            raise CheckpointError(
                f"{file}: {name}: expected finite values, found NaN or infinity: the training diverged, or the file is "
                f"damaged; take an earlier checkpoint"
            )
