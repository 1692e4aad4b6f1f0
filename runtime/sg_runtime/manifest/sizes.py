"""Facts about a bundle's further sizes of samples."""

from dataclasses import dataclass

from sg_runtime.manifest.base import Strict
from sg_runtime.manifest.graphs import EngineFacts, GraphFacts, PassCost
from sg_runtime.manifest.guidance import GuidancePlan


@dataclass(frozen=True, slots=True)
class SizeFacts(Strict):
    """What a bundle holds for samples of another size than its `model` describes.

    All sizes share the rest of the manifest, and the hoisted graphs that do not depend on the size.

    latent: shape (C, H, W) of one sample.
    tokens: N, number of tokens of one sample.
    guidance: default guidance plan, with the numbers of kept tokens at this size.
    graphs: graphs of this size alone.
    engines: engines of this size alone.
    passes: costs of single branches of which a bundle of engines holds no graph.
    """

    latent: tuple[int, int, int]
    tokens: int
    guidance: GuidancePlan
    graphs: tuple[GraphFacts, ...]
    engines: tuple[EngineFacts, ...]
    passes: tuple[PassCost, ...]
