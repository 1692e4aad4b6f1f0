"""The computation that all token-sparse networks share.

It consists of the layers before the route, the route on the kept tokens, the layers after the route
and the combination of the two branches.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sg_export.models.branches import Branch, Branches, Place, join
from sg_export.models.subset import Subset
from sg_runtime.manifest import Route
from sg_runtime.vocabulary import HOISTED

Keep = Tensor | Subset | None
"""Kept tokens of a branch: indices (B, K) int64 within each image, or rows; None for all tokens."""


@dataclass(frozen=True, slots=True)
class BranchInputs:
    """The inputs of one branch, without the image.

    held: what does not change within a step, by name; see `Network.held`. Branches share what is
    the same tensor.
    keep: the kept tokens; None for a dense branch.
    """

    held: Mapping[str, Tensor]
    keep: Keep = None


class Network(Protocol):
    """The parts of one family's network.

    D is its width, N the number of tokens of an image, M the size of its modulations, R the number
    of packed tokens. Packed tokens are the tokens of one or more branches, see `Branches`.

    layers: number of layers, without the final layer.
    held: shape, for one image, of each tensor that does not change within a step, by name:
    "modulations" is (M,). Networks with text also hold "text_keys", "text_values" and "text_bias".
    hoisted: arguments of the methods that compute the held tensors, by the method's name. These are
    "condition", and "prompt" for networks with text. Their results are named in
    `sg_runtime.vocabulary.HOISTED`.
    sized: names of those methods whose results depend on the size of the image.
    ends: names of the modules that stay in FP32.
    mask: mask token (1, 1, D) that replaces dropped tokens after the route, of the width there;
    None if dropped tokens bypass the route.
    """

    layers: int
    held: Mapping[str, tuple[int, ...]]
    hoisted: Mapping[str, tuple[str, ...]]
    sized: tuple[str, ...]
    ends: tuple[str, ...]
    mask: Tensor | None

    def embed(self, x: Tensor) -> Tensor:
        """Embed images: x (B, C, H, W) → tokens (B, N, D)."""
        ...

    def layer(self, index: int, tokens: Tensor, branches: Branches) -> Tensor:
        """Run layer `index` on packed tokens: (B, R, D) → (B, R, D).

        The output may have another width, which the next layer expects. branches: with this
        layer's part of the held tensors, see `layer_inputs`.
        """
        ...

    def layer_inputs(self, index: int) -> Mapping[str, Place]:
        """Return layer `index`'s part of the held tensors, by name; see `Branches.of`.

        "modulations" has a slice of M. The kinds of parts are the same for all layers of a kind.
        """
        ...

    def layer_kind(self, index: int) -> Hashable:
        """Return a value that is equal for layers that differ only in their weights.

        One layer of each kind is traced.
        """
        ...

    def layer_name(self, index: int) -> str:
        """Return the name of a layer's module, the prefix of its weights' names."""
        ...

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the last normalisation, without modulation: tokens (B, R, D) → (B, R, D)."""
        ...

    def modulate(self, normed: Tensor, branches: Branches) -> Tensor:
        """Apply the last modulation: normed (B, R, D) → (B, R, D). It is affine in `normed`.

        branches: with the held tensors of all layers. Only "modulations" are used.
        """
        ...

    def project(self, tokens: Tensor) -> Tensor:
        """Map tokens to the output: tokens (B, N, D) → (B, C, H, W). The map is affine."""
        ...


class SparseModel(nn.Module):
    """A network with its route, the layers that run on the kept tokens only."""

    def __init__(self, network: nn.Module, route: Route) -> None:
        super().__init__()
        self.network: Network = network  # type: ignore[assignment]  # a module that is also a Network
        self.route = route
        self.run_layers: Callable[[range, Tensor, Branches], Tensor] = self._run_layers
        """Function that runs layers in order. `sg_export.graph.trace` replaces it while tracing."""

    def forward(self, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], keep: Keep = None) -> Tensor:
        """Run one branch: x (B, C, H, W), t (B,), conditions, keep → output (B, C, H, W).

        conditions: what the images are conditioned on, with B rows, by name; see `held`. keep: the
        kept tokens; None for a dense branch.
        """
        return self.predict(x, self.held({"t": t, **conditions}), keep)

    def held(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute what does not change within a step, by name.

        given: "t" (S,) float32, and "class" (S,) int64, or "embeddings" (S, L, C) float32 and
        "mask" (S, L) int64.
        """
        return {
            name: output
            for kind in self.network.hoisted
            for name, output in zip(HOISTED[kind], self.hoist(kind, given), strict=True)
        }

    def hoist(self, kind: str, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Compute the outputs of the hoisted graph of this kind from its inputs by name."""
        found = getattr(self.network, kind)(*(given[name] for name in self.network.hoisted[kind]))
        return found if isinstance(found, tuple) else (found,)

    def predict(self, x: Tensor, held: Mapping[str, Tensor], keep: Keep = None) -> Tensor:
        """Run one branch: x (B, C, H, W) → output (B, C, H, W).

        held: what does not change within a step, by name; see `Network.held`. keep: the kept
        tokens; None for a dense branch.
        """
        normed, branches = self._normed(x, (BranchInputs(held, keep),))
        return self.network.project(self.network.modulate(normed, branches))

    def guided(self, x: Tensor, strong: BranchInputs, weak: BranchInputs, scale: Tensor) -> Tensor:
        """Run both branches and combine them, weak + scale * (strong - weak) → output (B, C, H, W).

        Every weight is read once, for the packed tokens of both branches. The branches are combined
        at the first point at which that is exact: all later operations are affine and the same for
        both branches, and the factors of the branches, scale and 1 - scale, sum to one. With shared
        modulations this point is after the last normalisation, otherwise after the last modulation.
        """

        def combined(packed: Tensor) -> Tensor:
            strong, weak = packed.chunk(2, dim=1)
            return weak + scale * (strong - weak)

        network = self.network
        normed, branches = self._normed(x, (strong, weak))
        if branches.shares("modulations"):
            return network.project(network.modulate(combined(normed), Branches(branches[:1])))
        return network.project(combined(network.modulate(normed, branches)))

    def _normed(self, x: Tensor, inputs: tuple[BranchInputs, ...]) -> tuple[Tensor, Branches]:
        """Run everything up to the last normalisation, for one branch per entry of `inputs`.

        Returns packed tokens (B, number of branches * N, D). Branches that share everything that
        they hold share the layers before the route.
        """
        network, start, stop = self.network, self.route.start, self.route.end + 1
        embedded = network.embed(x)
        count = embedded.shape[1]
        complete = Branches(Branch(count, None, given.held) for given in inputs)
        prefix = Branches(complete[:1]) if complete.alike else complete
        embedded = self.run_layers(range(start), join([embedded] * len(prefix)), prefix)
        whole = [*prefix.split(embedded)] * (len(complete) // len(prefix))

        mask = network.mask
        subsets = [
            Subset.of(given.keep, count, mask is not None) if isinstance(given.keep, Tensor) else given.keep
            for given in inputs
        ]
        kept = [
            tokens if subset is None else subset.take(tokens) for tokens, subset in zip(whole, subsets, strict=True)
        ]
        route = Branches(
            Branch(tokens.shape[1], subset, given.held)
            for tokens, subset, given in zip(kept, subsets, inputs, strict=True)
        )
        kept = [*route.split(self.run_layers(range(start, stop), join(kept), route))]

        tokens = join(
            [
                routed if subset is None else subset.put_back(before if mask is None else mask, routed)
                for before, subset, routed in zip(whole, subsets, kept, strict=True)
            ]
        )
        return network.norm(self.run_layers(range(stop, network.layers), tokens, complete)), complete

    def _run_layers(self, layers: range, tokens: Tensor, branches: Branches) -> Tensor:
        for index in layers:
            tokens = self.network.layer(index, tokens, branches.of(self.network.layer_inputs(index)))
        return tokens
