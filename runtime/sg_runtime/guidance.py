"""The Sparse Guidance update, and the choice of branches for a run."""

import numpy as np
from numpy.typing import NDArray

from sg_runtime.errors import UsageError
from sg_runtime.manifest import GuidanceMode, GuidancePlan, Level, Manifest

Array = NDArray[np.float32]


def guide(strong: Array, weak: Array, scale: float) -> Array:
    """weak + scale * (strong - weak).

    strong, weak: (B, C, H, W) float32 predictions of the low- and the high-sparsity branch.
    Source: arXiv 2601.01608, eq. 7.
    """
    return weak + np.float32(scale) * (strong - weak)


def levels(manifest: Manifest) -> list[Level]:
    """The sparsities that the bundle has a single-branch graph for, densest first."""
    found = {level for graph in manifest.graphs if graph.kind in ("dense", "sparse") for level in graph.levels}
    return sorted(found, key=lambda level: -level.keep)


def choose(
    manifest: Manifest,
    *,
    mode: GuidanceMode | None = None,
    strong_sparsity: float | None = None,
    sparsity: float | None = None,
    scale: float | None = None,
) -> GuidancePlan:
    """The bundle's guidance plan with the given parts replaced.

    `sparsity` is the weak branch's. Outside sg both branches share the strong sparsity. Raises UsageError for a
    sparsity that was not built, naming the build that would serve.
    """
    plan = manifest.guidance
    chosen: GuidanceMode = plan.mode if mode is None else mode
    strong = plan.strong if strong_sparsity is None else _level(manifest, strong_sparsity, "--strong-sparsity")
    if chosen != "sg":
        if sparsity is not None:
            raise UsageError(f"{chosen} guidance has one sparsity: give strong_sparsity, not sparsity")
        weak = strong
    elif sparsity is not None:
        weak = _level(manifest, sparsity, "--sparsity")
    elif plan.mode == "sg":
        weak = plan.weak
    else:
        raise UsageError(f"sg guidance: give sparsity, one of {_names(manifest)}")
    return GuidancePlan(chosen, strong, weak, plan.scale if scale is None else float(scale))


def _level(manifest: Manifest, sparsity: float, option: str) -> Level:
    for level in levels(manifest):
        if abs(level.sparsity - sparsity) < 1e-9:
            return level
    raise UsageError(
        f"sparsity {sparsity:g} is not in this bundle, which has {_names(manifest)}; "
        f"build it with: sg-export build {manifest.source.name} {option} {sparsity:g}"
    )


def _names(manifest: Manifest) -> str:
    return ", ".join(f"{level.sparsity:g}" for level in levels(manifest))
