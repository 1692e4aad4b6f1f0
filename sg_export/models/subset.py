"""The kept tokens of a branch: taken before the route, put back after it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Subset:
    """The kept tokens of B images, as the row numbers of two gathers.

    A graph computes no shape for them, whatever its batch size. `sg_runtime.run.kept` has the same
    in NumPy.

    rows: (B, K) int64, rows of the kept tokens among the B * N tokens of all images.
    restore: (B, N) int64, row of each token after the route among the rows that replace dropped
    tokens, followed by the B * K routed tokens. Dropped tokens are replaced by themselves, B * N
    rows, or by a mask token, one row.
    """

    rows: Tensor
    restore: Tensor

    @classmethod
    def of(cls, keep: Tensor, tokens: int, masked: bool) -> "Subset":
        """Return the subset of the kept tokens `keep`, (B, K) indices among the N of an image.

        masked: whether a mask token replaces the dropped tokens.
        """
        images, count = keep.shape
        own = torch.arange(images * tokens, device=keep.device).view(images, tokens)
        routed = torch.arange(images * count, device=keep.device).view(images, count)
        dropped, first = (torch.zeros_like(own), 1) if masked else (own, images * tokens)
        return cls(own.gather(1, keep), dropped.scatter(1, keep, first + routed))

    def take(self, tokens: Tensor) -> Tensor:
        """Return the kept tokens: tokens (B, N, D) → (B, K, D)."""
        return F.embedding(self.rows, tokens.flatten(0, 1))

    def put_back(self, dropped: Tensor, routed: Tensor) -> Tensor:
        """Return all tokens: dropped (B, N, D) or (1, 1, D), routed (B, K, D) → (B, N, D)."""
        return F.embedding(self.restore, torch.cat([dropped.flatten(0, 1), routed.flatten(0, 1)]))

    def positions(self) -> Tensor:
        """Return the positions of the kept tokens within their image: (B, K) int64."""
        return self.rows % self.restore.shape[1]

    def all_positions(self) -> Tensor:
        """Return the positions 0 … N - 1 for each image: (B, N) int64.

        B follows from the sum, so a graph reads no shape.
        """
        return 0 * self.restore + torch.arange(self.restore.shape[1], device=self.restore.device)
