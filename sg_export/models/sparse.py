"""What every token-sparse network shares: the prefix, the route over the kept tokens, the suffix, the combination."""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor, nn

from sg_export.models.branches import Branches, join
from sg_runtime.manifest import Route


class Network(Protocol):
    """The parts of one family's network. D is its width, N its token count, M the size of its modulations.

    Tokens may be those of several branches, packed: see `Branches`.
    """

    layers: int
    modulations: int
    ends: tuple[str, ...]

    def condition(self, t: Tensor, classes: Tensor) -> Tensor:
        """t (S,) float32, classes (S,) int64 → modulations (S, M), all that the step needs of both."""
        ...

    def embed(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → tokens (B, N, D)."""
        ...

    def layer(self, index: int, tokens: Tensor, branches: Branches) -> Tensor:
        """tokens (B, R, D) → (B, R, D), or another width that the next layer takes; with its own modulations."""
        ...

    def layer_modulations(self, index: int) -> slice:
        """The places of a layer's modulations among all."""
        ...

    def layer_kind(self, index: int) -> Hashable:
        """Equal for layers that compute the same with other weights: of these one is traced."""
        ...

    def layer_name(self, index: int) -> str:
        """The name of a layer's module, with which those of its weights begin."""
        ...

    def dropped(self, tokens: Tensor) -> Tensor:
        """What stands after the route for tokens that were left out: (B, N, D) before it → (B, N, D) after it."""
        ...

    def norm(self, tokens: Tensor) -> Tensor:
        """The last normalisation, free of modulation: tokens (B, R, D) → (B, R, D)."""
        ...

    def modulate(self, normed: Tensor, branches: Branches) -> Tensor:
        """The last modulation: normed (B, R, D) → (B, R, D). Affine in `normed`. `branches` have all modulations."""
        ...

    def project(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) → output (B, C, H, W). Affine."""
        ...


class SparseModel(nn.Module):
    """A network and its route: the layers that run on the kept tokens alone."""

    def __init__(self, network: nn.Module, route: Route) -> None:
        super().__init__()
        self.network: Network = network  # type: ignore[assignment]  # a module that is also a Network
        self.route = route
        self.run_layers: Callable[[range, Tensor, Branches], Tensor] = self._run_layers
        """Runs layers in order; `sg_export.graph.trace` puts itself in its place."""

    def forward(self, x: Tensor, t: Tensor, classes: Tensor, keep: Tensor | None = None) -> Tensor:
        """One branch: x (B, C, H, W), t (B,), classes (B,) and, where it is sparse, keep (B, K) → (B, C, H, W)."""
        return self.predict(x, self.condition(t, classes), keep)

    def condition(self, t: Tensor, classes: Tensor) -> Tensor:
        """t (S,) float32, classes (S,) int64 → modulations (S, M)."""
        return self.network.condition(t, classes)

    def predict(self, x: Tensor, modulations: Tensor, keep: Tensor | None = None) -> Tensor:
        """One branch: x (B, C, H, W), modulations (B, M), keep (B, K) int64 or None → output (B, C, H, W)."""
        normed, branches = self._normed(x, (modulations,), (keep,))
        return self.network.project(self.network.modulate(normed, branches))

    def guided(
        self,
        x: Tensor,
        modulations: Tensor,
        keep_strong: Tensor | None,
        keep_weak: Tensor | None,
        scale: Tensor,
        modulations_weak: Tensor | None = None,
    ) -> Tensor:
        """Both branches and their combination, weak + scale * (strong - weak) → output (B, C, H, W).

        Every weight is used once, on the packed tokens of both. The branches meet where that is first exact: what
        follows is affine, the same for both, and their weights, scale and 1 - scale, sum to one. With shared
        modulations that is after the last normalisation, with `modulations_weak` after the last modulation.
        """

        def combined(packed: Tensor) -> Tensor:
            strong, weak = packed.chunk(2, dim=1)
            return weak + scale * (strong - weak)

        network = self.network
        if modulations_weak is None:
            normed, branches = self._normed(x, (modulations,), (keep_strong, keep_weak))
            return network.project(network.modulate(combined(normed), branches))
        normed, branches = self._normed(x, (modulations, modulations_weak), (keep_strong, keep_weak))
        return network.project(combined(network.modulate(normed, branches)))

    def _normed(
        self, x: Tensor, modulations: tuple[Tensor, ...], keeps: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Branches]:
        """All up to the last normalisation, for a branch per entry of `keeps`: (B, branches * N, D), packed.

        Branches that share their modulations share the layers before the route.
        """
        network, start, stop = self.network, self.route.start, self.route.end + 1
        embedded = network.embed(x)
        count = embedded.shape[1]
        prefix = Branches((count,) * len(modulations), modulations)
        embedded = self.run_layers(range(start), join([embedded] * len(modulations)), prefix)
        whole = [*prefix.split(embedded)] * (len(keeps) // len(modulations))

        kept = [tokens if keep is None else tokens[_rows(keep)] for tokens, keep in zip(whole, keeps, strict=True)]
        route = Branches(tuple(tokens.shape[1] for tokens in kept), modulations)
        kept = [*route.split(self.run_layers(range(start, stop), join(kept), route))]

        suffix = Branches((count,) * len(keeps), modulations)
        tokens = join(
            [
                routed if keep is None else network.dropped(before).index_put(_rows(keep), routed)
                for before, keep, routed in zip(whole, keeps, kept, strict=True)
            ]
        )
        return network.norm(self.run_layers(range(stop, network.layers), tokens, suffix)), suffix

    def _run_layers(self, layers: range, tokens: Tensor, branches: Branches) -> Tensor:
        for index in layers:
            tokens = self.network.layer(index, tokens, branches.of(self.network.layer_modulations(index)))
        return tokens


def _rows(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the kept tokens of every image: keep (B, K)."""
    return torch.arange(keep.shape[0], device=keep.device)[:, None], keep
