"""Branches packed along the token axis.

One matmul runs on the rows of all branches. Attention and modulation run for each branch.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branches:
    """Division of packed tokens (B, R, D) into branches, with the modulations of the branches.

    counts: number of tokens of each branch; their sum is R.
    modulations: one tensor that all branches share, or one tensor per branch. Each is (B, M) for
    all layers, or (B, 1, m) for one layer, with m the size of its modulations.
    """

    counts: tuple[int, ...]
    modulations: tuple[Tensor, ...]

    def split(self, packed: Tensor) -> Sequence[Tensor]:
        """Split packed tokens (B, R, D) into the branches, each (B, count, D).

        It uses slices, not one Split: ONNX Runtime's CUDA kernel of Split copies the sizes of
        uneven parts from the host in every run.
        """
        ends = list(itertools.accumulate(self.counts))
        return [packed[:, end - count : end] for end, count in zip(ends, self.counts, strict=True)]

    def of(self, places: slice) -> "Branches":
        """Return the branches with the modulations of one layer, (B, 1, m), instead of all, (B, M).

        places: the slice of M that belongs to the layer; its length is m.
        """
        return Branches(self.counts, tuple(m[:, None, places] for m in self.modulations))

    def vectors(self, count: int) -> list[tuple[Tensor, ...]]:
        """Split a layer's modulations into `count` vectors of equal width.

        Returns one tuple per vector. A tuple has one tensor (B, 1, width) per modulation tensor.
        """
        return list(zip(*(m.chunk(count, dim=-1) for m in self.modulations), strict=True))

    def each(self, function: Callable[..., Tensor], packed: Tensor, *vectors: tuple[Tensor, ...]) -> Tensor:
        """Apply `function(tokens, *vectors)` to packed tokens.

        If the branches share their modulations, it is applied to all rows at once; otherwise, to
        one branch at a time, with the vectors of that branch.
        """
        if len(self.modulations) == 1:
            return function(packed, *(vector[0] for vector in vectors))
        parts = zip(self.split(packed), *vectors, strict=True)
        return join([function(tokens, *branch_vectors) for tokens, *branch_vectors in parts])


def join(parts: Sequence[Tensor]) -> Tensor:
    """Pack branches along the token axis, the inverse of `Branches.split`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
