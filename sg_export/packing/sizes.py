"""The sizes that a bundle is built for: networks, guidance and graphs of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sg_export.graph.spec import GraphSpec
from sg_export.loading import LoadedModel
from sg_export.options.compile import CompileOptions
from sg_export.packing.pairs import choose_graphs
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GuidancePlan, size_text


@dataclass(frozen=True, slots=True)
class SizeBuild:
    """What is built for one size of the samples.

    loaded: the main network at this size.
    weak: the weak network at this size; None if there is no weak network.
    plan: default guidance plan.
    specs: graphs of this size. Hoisted graphs that serve all sizes are with the first.
    """

    loaded: LoadedModel
    weak: LoadedModel | None
    plan: GuidancePlan
    specs: tuple[GraphSpec, ...]

    def source(self, spec: GraphSpec) -> LoadedModel:
        """Return the network that a graph is traced from."""
        found = self.loaded if spec.network == "main" else self.weak
        assert found is not None
        return found


def choose_sizes(loaded: LoadedModel, weak: LoadedModel | None, options: CompileOptions) -> list[SizeBuild]:
    """Return what is built for each size, first that of `loaded`, then `options.sizes`.

    All sizes have the same parameters. If there are several, a graph that depends on the size has
    it in its spec. Raises UsageError for a size that is given twice or does not fit the network,
    and the errors of `choose_graphs`.
    """
    sizes = [loaded.facts.size, *options.sizes]
    for size in options.sizes:
        if sizes.count(size) > 1:
            raise UsageError(f"size {size_text(size)}: expected different sizes, found it twice: leave out one")
    builds = [SizeBuild(loaded, weak, *_chosen(loaded, weak, options))]
    for size in options.sizes:
        own, own_weak = loaded.at(*size), None if weak is None else weak.at(*size)
        builds.append(SizeBuild(own, own_weak, *_chosen(own, own_weak, options)))
    if len(builds) == 1:
        return builds
    first, *others = [replace(build, specs=_sized(build.specs, build.loaded)) for build in builds]
    return [first, *(replace(build, specs=tuple(s for s in build.specs if s.size is not None)) for build in others)]


def _chosen(
    loaded: LoadedModel, weak: LoadedModel | None, options: CompileOptions
) -> tuple[GuidancePlan, tuple[GraphSpec, ...]]:
    plan, specs = choose_graphs(loaded, weak, options)
    return plan, tuple(specs)


def _sized(specs: Sequence[GraphSpec], loaded: LoadedModel) -> tuple[GraphSpec, ...]:
    """Return the specs with the size of the samples in those that depend on it."""
    size, kinds = loaded.facts.size, loaded.model.network.sized
    return tuple(spec if spec.hoisted and spec.kind not in kinds else replace(spec, size=size) for spec in specs)
