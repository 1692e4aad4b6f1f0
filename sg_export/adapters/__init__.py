"""Adapters: one module per family of checkpoints."""

from collections.abc import Mapping
from typing import Protocol

from sg_export.adapters import maskdit, tread
from sg_export.checkpoint import Checkpoint, Overrides
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError
from sg_runtime.manifest import ModelFacts, Route


class Adapter(Protocol):
    """What the module of a family holds: its name, and state-dict names that no family after it in `ADAPTERS` has."""

    FAMILY: str
    KEYS: tuple[str, ...]

    def kept_count(self, tokens: int, sparsity: float) -> int:
        """Tokens that a branch keeps of `tokens`, by the family's rounding."""
        ...

    def usual_route(self, depth: int) -> Route:
        """The route to propose where a checkpoint's is unknown."""
        ...

    def build(self, checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
        """Make the network of a checkpoint, in evaluation mode, and state its facts."""
        ...


ADAPTERS: Mapping[str, Adapter] = {maskdit.FAMILY: maskdit, tread.FAMILY: tread}
"""By name; a family whose keys are those of another and more comes before it."""


def find_adapter(checkpoint: Checkpoint) -> Adapter:
    """The adapter of the checkpoint's family: the one it names, else the one whose keys it has.

    Raises CheckpointError that names the keys that decided.
    """
    path, named = checkpoint.source.file, checkpoint.facts.family
    if named is not None:
        if named not in ADAPTERS:
            raise CheckpointError(f"{path}: family {named!r}: expected one of {', '.join(ADAPTERS)}")
        return ADAPTERS[named]
    missing = {family: [key for key in a.KEYS if key not in checkpoint.tensors] for family, a in ADAPTERS.items()}
    for family, keys in missing.items():
        if not keys:
            return ADAPTERS[family]
    reasons = "; ".join(f"{family} needs {', '.join(keys)}" for family, keys in missing.items())
    found = ", ".join(sorted(checkpoint.tensors)[:6])
    raise CheckpointError(f"{path}: of no family that is supported: {reasons}; it starts with {found}")
