"""Memory of a run, and what fits into a budget."""

import math
from collections.abc import Callable

from sg_runtime.devices.memory import aligned
from sg_runtime.manifest import Manifest
from sg_runtime.run.workspace import LATENTS, LAUNCHES
from sg_runtime.vocabulary import SCALARS


def run_bytes(manifest: Manifest, batch: int, evaluations: int, separate: bool) -> int:
    """Bytes of a workspace and of the plan that fills it, the most that they can be."""
    model, networks = manifest.model, 1 + separate
    latents = LATENTS * aligned(batch * math.prod(model.latent) * 4)
    tables = networks * aligned(batch * model.modulations * 4)
    counts = {level.keep for graph in manifest.graphs for level in graph.levels}
    keeps = 2 * sum(aligned(batch * keep * 8) for keep in counts)
    scalars = LAUNCHES * len(SCALARS) * aligned(4)
    runs = -(-evaluations * (batch + separate) // manifest.condition_rows)  # of `condition`, for images and "no class"
    plan = networks * runs * manifest.condition_rows * model.modulations * 4
    return latents + evaluations * (tables + keeps + scalars) + plan


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, 0 where none does; what fits for one number fits for all below."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fitting(
    manifest: Manifest, batches: tuple[int, ...] | None, batch: int, evaluations: int, separate: bool, free: int
) -> str:
    """What to ask for so that a run needs at most `free` bytes: fewer evaluations at a time, else fewer images.

    batches: the image counts that there are, None for any.
    """
    chunk = largest(lambda size: run_bytes(manifest, batch, size, separate) <= free, evaluations)
    if chunk:
        return f"Pipeline.load(…, chunk={chunk}) would fit"

    def fits(images: int) -> bool:
        return run_bytes(manifest, images, 1, separate) <= free

    images = largest(fits, batch)
    if batches is not None:
        images = max((size for size in batches if size < batch and fits(size)), default=0)
    if images:
        return f"Pipeline.load(…, batch={images}, chunk=1) would fit"
    return "free some memory, or build for fewer images" if batches else "not even one image fits: free some memory"
