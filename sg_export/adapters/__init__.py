"""Adapters: one module per family of checkpoints."""

from collections.abc import Mapping
from typing import Protocol

from sg_export.adapters import maskdit, prx, tread
from sg_export.checkpoint import Checkpoint, Overrides
from sg_export.models.sparse import SparseModel
from sg_export.recognize import what_network_is
from sg_runtime.errors import CheckpointError
from sg_runtime.manifest import ModelFacts, Route, Sampling


class Adapter(Protocol):
    """The attributes of a family's module.

    FAMILY: name of the family.
    KEYS: state-dict names that identify it; no later family in `ADAPTERS` has all of them.
    PREFIXES: what may stand before all of `KEYS`.
    """

    FAMILY: str
    KEYS: tuple[str, ...]
    PREFIXES: tuple[str, ...]

    def kept_count(self, tokens: int, sparsity: float) -> int:
        """Return how many of `tokens` a branch keeps at `sparsity`, by the family's rounding."""
        ...

    def usual_route(self, depth: int) -> Route:
        """Return the route to propose if a checkpoint's route is unknown."""
        ...

    def build(self, checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
        """Build the network of a checkpoint, in evaluation mode, and return it with its facts."""
        ...

    def resized(
        self, file: str, model: SparseModel, facts: ModelFacts, size: tuple[int, int]
    ) -> tuple[SparseModel, ModelFacts]:
        """Return the model for another size of the picture in pixels, with the same parameters.

        file: name of the checkpoint, for errors. Raises UsageError for a size that does not fit.
        """
        ...

    def sampling(self, checkpoint: Checkpoint, facts: ModelFacts) -> Sampling:
        """Return the default sampling of the network that `build` returns with `facts`."""
        ...


ADAPTERS: Mapping[str, Adapter] = {maskdit.FAMILY: maskdit, tread.FAMILY: tread, prx.FAMILY: prx}
"""Adapters by family. A family whose checkpoints also have another family's keys comes first."""


def find_adapter(checkpoint: Checkpoint) -> Adapter:
    """Return the adapter of the checkpoint's family.

    It is the family that the checkpoint's facts name, or else the first whose keys it has. Raises
    CheckpointError with the missing keys of each family if there is none, and with the prefix that
    hides one.
    """
    path, named = checkpoint.source.file, checkpoint.facts.family
    if named is not None:
        if named not in ADAPTERS:
            raise CheckpointError(f"{path}: family {named!r}: expected one of {', '.join(ADAPTERS)}")
        return ADAPTERS[named]
    missing = {family: _missing(adapter, checkpoint) for family, adapter in ADAPTERS.items()}
    for family, keys in missing.items():
        if not keys:
            return ADAPTERS[family]
    reasons = "; ".join(f"{family} needs {', '.join(keys)}" for family, keys in missing.items())
    found = ", ".join(sorted(checkpoint.tensors)[:6])
    ends = tuple(f".{adapter.KEYS[0]}" for adapter in ADAPTERS.values())
    prefix = next((name.removesuffix(end) for name in checkpoint.tensors for end in ends if name.endswith(end)), None)
    remedy = f"; there is one under {prefix}: give `weights` {prefix}" if prefix else ""
    *others, last = ADAPTERS
    if not prefix and (other := what_network_is(checkpoint.tensors)) is not None:
        raise CheckpointError(f"{path}: expected a checkpoint of {', '.join(others)} or {last}, found {other}")
    raise CheckpointError(f"{path}: expected a checkpoint of a supported family ({reasons}), found {found}{remedy}")


def _missing(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """Return the keys of a family that a checkpoint lacks, with the prefix that finds most."""
    tensors = checkpoint.tensors
    lacks = [[key for key in adapter.KEYS if f"{prefix}{key}" not in tensors] for prefix in adapter.PREFIXES]
    return min(lacks, key=len)
