"""Branches packed along the token axis: one matrix product for all rows, attention and modulation for each branch."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branches:
    """How packed tokens (B, R, D) divide, and what modulates them.

    counts: tokens of each branch, R in all. modulations: one that all branches share, or one for each: (B, M), or
    (B, 1, own) where they are those of one layer.
    """

    counts: tuple[int, ...]
    modulations: tuple[Tensor, ...]

    def split(self, packed: Tensor) -> Sequence[Tensor]:
        """packed (B, R, D) → (B, count, D) for each branch.

        Slices, not one Split: ONNX Runtime's CUDA kernel copies the sizes of uneven parts from the host in every run.
        """
        ends = list(itertools.accumulate(self.counts))
        return [packed[:, end - count : end] for end, count in zip(ends, self.counts, strict=True)]

    def of(self, places: slice) -> "Branches":
        """The same branches with the modulations of one layer, (B, 1, own), out of all, (B, M)."""
        return Branches(self.counts, tuple(m[:, None, places] for m in self.modulations))

    def vectors(self, count: int) -> list[tuple[Tensor, ...]]:
        """A layer's modulations in `count` vectors of one width, each (B, 1, width) per modulation."""
        return list(zip(*(m.chunk(count, dim=-1) for m in self.modulations), strict=True))

    def each(self, function: Callable[..., Tensor], packed: Tensor, *vectors: tuple[Tensor, ...]) -> Tensor:
        """`function(tokens, *vectors)` over all rows at once where the vectors are shared, else branch by branch."""
        if len(self.modulations) == 1:
            return function(packed, *(vector[0] for vector in vectors))
        parts = zip(self.split(packed), *vectors, strict=True)
        return join([function(tokens, *own) for tokens, *own in parts])


def join(parts: Sequence[Tensor]) -> Tensor:
    """The opposite of `Branches.split`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
