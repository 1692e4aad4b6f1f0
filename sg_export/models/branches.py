"""Branches packed along the token axis.

One matmul runs on the rows of all branches. Attention runs for each branch. Modulation runs once if
the branches share their modulations, otherwise for each branch.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sg_export.models.subset import Subset

Place = slice | int
"""The part of a held tensor that belongs to a layer; see `Branches.of`."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch of packed tokens.

    count: number of its tokens.
    subset: its kept tokens; None if its tokens are all N tokens in order.
    held: what does not change within a step, by name. Branches share what is the same tensor.
    "modulations": (B, M) for all layers, or (B, 1, m) for one layer, with m the size of its
    modulations. Networks with text also hold "text_keys" and "text_values", as
    `sg_export.models.sparse.Network.held` says.
    """

    count: int
    subset: Subset | None
    held: Mapping[str, Tensor]


class Branches(tuple[Branch, ...]):
    """Division of packed tokens (B, R, D) into branches, whose counts add up to R.

    All branches hold the same names.
    """

    __slots__ = ()

    def shares(self, name: str) -> bool:
        """Whether all branches hold the same tensor under this name."""
        return all(branch.held[name] is self[0].held[name] for branch in self)

    @property
    def alike(self) -> bool:
        """Whether the branches share everything that they hold."""
        return all(map(self.shares, self[0].held))

    def split(self, packed: Tensor) -> Sequence[Tensor]:
        """Split packed tokens (B, R, D) into the branches, each (B, count, D).

        It uses slices, not one Split: ONNX Runtime's CUDA kernel of Split copies the sizes of
        uneven parts from the host in every run.
        """
        ends = itertools.accumulate(branch.count for branch in self)
        return [packed[:, end - branch.count : end] for branch, end in zip(self, ends, strict=True)]

    def of(self, places: Mapping[str, Place]) -> "Branches":
        """Return the branches with what one layer takes of the held tensors.

        places: the layer's part of a held tensor, by name. A slice is a part of the values of
        (B, M) and gives (B, 1, m). A number is an entry of axis 1 and gives (B, ...) from
        (B, entries, ...). A tensor without a place is given whole.
        """
        cut: dict[tuple[str, int], Tensor] = {}  # each tensor once: the parts of shared tensors are shared

        def part(name: str, tensor: Tensor) -> Tensor:
            if name not in places:
                return tensor
            if (name, id(tensor)) not in cut:
                place = places[name]
                cut[name, id(tensor)] = tensor[:, None, place] if isinstance(place, slice) else tensor[:, place]
            return cut[name, id(tensor)]

        return Branches(
            replace(branch, held={name: part(name, tensor) for name, tensor in branch.held.items()}) for branch in self
        )

    def at(self, table: Tensor) -> Tensor:
        """Return the rows of a table by position for packed tokens, (1, R, P) or (B, R, P).

        table: (1, N, P) or (N, P), a row of P values for each of the N tokens of an image.
        """
        subsets = [branch.subset for branch in self]
        known = next((subset for subset in subsets if subset is not None), None)
        if known is None:
            rows = table if table.ndim == 3 else table[None]
            return rows if len(self) == 1 else rows.repeat(1, len(self), 1)
        positions = [known.all_positions() if subset is None else subset.positions() for subset in subsets]
        return F.embedding(join(positions), table if table.ndim == 2 else table.flatten(0, 1))

    def vectors(self, count: int) -> list[tuple[Tensor, ...]]:
        """Split a layer's modulations into `count` vectors of equal width.

        Returns one tuple per vector. A tuple has one tensor (B, 1, width) if the branches share
        their modulations, otherwise one per branch.
        """
        owners = self[:1] if self.shares("modulations") else self
        return list(zip(*(branch.held["modulations"].chunk(count, dim=-1) for branch in owners), strict=True))

    def each(self, function: Callable[..., Tensor], packed: Tensor, *vectors: tuple[Tensor, ...]) -> Tensor:
        """Apply `function(tokens, *vectors)` to packed tokens.

        If the branches share their modulations, it is applied to all rows at once; otherwise, to
        one branch at a time, with the vectors of that branch.
        """
        if self.shares("modulations"):
            return function(packed, *(vector[0] for vector in vectors))
        parts = zip(self.split(packed), *vectors, strict=True)
        return join([function(tokens, *branch_vectors) for tokens, *branch_vectors in parts])


def join(parts: Sequence[Tensor]) -> Tensor:
    """Pack branches along the token axis, the inverse of `Branches.split`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
