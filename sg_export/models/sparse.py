"""What every token-sparse network shares: the prefix, the route over the kept tokens, the suffix, the combination."""

from typing import Protocol

import torch
from torch import Tensor, nn

from sg_runtime.manifest import Route


class Network(Protocol):
    """The parts of one family's network. D is its width, N its token count, M the size of its modulations."""

    depth: int
    modulations: int

    def condition(self, t: Tensor, classes: Tensor) -> Tensor:
        """t (S,) float32, classes (S,) int64 → modulations (S, M), all that the step needs of both."""
        ...

    def embed(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → tokens (B, N, D)."""
        ...

    def block(self, index: int, tokens: Tensor, modulations: Tensor) -> Tensor:
        """tokens (B, K, D), modulations (B, M) → (B, K, D)."""
        ...

    def norm(self, tokens: Tensor) -> Tensor:
        """The last normalisation, free of modulation: tokens (B, N, D) → (B, N, D)."""
        ...

    def head(self, normed: Tensor, modulations: Tensor) -> Tensor:
        """normed (B, N, D), modulations (B, M) → prediction (B, C, H, W). Affine in `normed`."""
        ...


class SparseModel(nn.Module):
    """A network and its route: the blocks that run on the kept tokens alone. The other tokens bypass them unchanged."""

    def __init__(self, network: nn.Module, route: Route) -> None:
        super().__init__()
        self.network: Network = network  # type: ignore[assignment]  # a module that is also a Network
        self.route = route

    def forward(self, x: Tensor, t: Tensor, classes: Tensor, keep: Tensor | None = None) -> Tensor:
        """One branch: x (B, C, H, W), t (B,), classes (B,) and, where it is sparse, keep (B, K) → (B, C, H, W)."""
        return self.predict(x, self.condition(t, classes), keep)

    def condition(self, t: Tensor, classes: Tensor) -> Tensor:
        """t (S,) float32, classes (S,) int64 → modulations (S, M)."""
        return self.network.condition(t, classes)

    def predict(self, x: Tensor, modulations: Tensor, keep: Tensor | None = None) -> Tensor:
        """One branch: x (B, C, H, W), modulations (B, M), keep (B, K) int64 or None → prediction (B, C, H, W)."""
        tokens = self._finish(self._prefix(x, modulations), modulations, keep)
        return self.network.head(tokens, modulations)

    def guided(
        self, x: Tensor, modulations: Tensor, keep_strong: Tensor | None, keep_weak: Tensor, scale: Tensor
    ) -> Tensor:
        """Both branches and their combination, weak + scale * (strong - weak) → prediction (B, C, H, W).

        The prefix runs once. The branches meet after the last normalisation, the earliest point where that is exact:
        what follows is affine, the same for both, and their weights, scale and 1 - scale, sum to one.
        """
        tokens = self._prefix(x, modulations)
        strong = self._finish(tokens, modulations, keep_strong)
        weak = self._finish(tokens, modulations, keep_weak)
        return self.network.head(weak + scale * (strong - weak), modulations)

    def _prefix(self, x: Tensor, modulations: Tensor) -> Tensor:
        return self._run(self.network.embed(x), modulations, 0, self.route.start)

    def _finish(self, tokens: Tensor, modulations: Tensor, keep: Tensor | None) -> Tensor:
        """The route and all after it, up to the last normalisation: tokens (B, N, D) → (B, N, D)."""
        after = self.route.end + 1
        if keep is None:
            tokens = self._run(tokens, modulations, self.route.start, after)
        else:
            rows = torch.arange(keep.shape[0], device=keep.device)[:, None], keep
            kept = self._run(tokens[rows], modulations, self.route.start, after)
            tokens = tokens.index_put(rows, kept)
        return self.network.norm(self._run(tokens, modulations, after, self.network.depth))

    def _run(self, tokens: Tensor, modulations: Tensor, start: int, stop: int) -> Tensor:
        for index in range(start, stop):
            tokens = self.network.block(index, tokens, modulations)
        return tokens
