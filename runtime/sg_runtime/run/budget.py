"""Memory estimates of a run, and the largest run that fits into a budget."""

import math
from collections.abc import Callable

from sg_runtime.devices.memory import aligned
from sg_runtime.manifest import GraphFacts, Manifest, Part
from sg_runtime.run.workspace import LATENTS, LAUNCHES
from sg_runtime.vocabulary import SCALARS


def run_bytes(manifest: Manifest, batch: int, evaluations: int, separate: bool) -> int:
    """Return an upper bound in bytes of a workspace and of the prepared run that fills it.

    evaluations: number of evaluations whose conditioning is held at a time. separate: whether the
    weak branch has conditioning of its own.
    """
    model, branches = manifest.model, 1 + separate
    latents = LATENTS * aligned(batch * math.prod(model.latent) * 4)
    sizes = {graph.kind: _row_bytes(manifest, graph) for graph in manifest.graphs if graph.hoisted}
    tables = {kind: branches * sum(aligned(batch * size) for size in row) for kind, row in sizes.items()}
    timed, shared = tables["condition"], tables.get("prompt", 0)
    counts = {level.keep for graph in manifest.graphs for level in graph.levels}
    keeps = 2 * sum(aligned(batch * keep * 8) + aligned(batch * model.tokens * 8) for keep in counts)
    scalars = LAUNCHES * len(SCALARS) * aligned(4)
    plan = 0  # a row per image, and one for "no class" or as many for negative prompts
    for kind, row in sizes.items():
        count = evaluations * (batch + separate) if kind == "condition" else branches * batch
        rows = manifest.hoisted_rows[kind]
        plan += branches * -(-count // rows) * rows * sum(row)
    return latents + shared + evaluations * (timed + keeps + scalars) + plan


def _row_bytes(manifest: Manifest, graph: GraphFacts) -> list[int]:
    """Return the bytes of one row of each output of a hoisted graph."""
    held = manifest.model.held
    return [math.prod(held[tensor.name]) * tensor.storage.itemsize for tensor in graph.outputs]


def part_bytes(manifest: Manifest, part: Part) -> int:
    """Return the bytes of a part's weights and of the activations of one image.

    Engines count by their files. If there are several of one graph, the largest counts.
    """
    holder = manifest if part == "step" else manifest.parts[part]
    engines = [manifest.files[engine.file].size for engine in holder.all_engines]
    weights = [graph.cost.weight_bytes for graph in holder.all_graphs]
    return max(engines or weights) + max(graph.cost.activation_bytes for graph in holder.all_graphs)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, or 0 if none does.

    If one number fits, all smaller numbers must fit.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fitting(
    manifest: Manifest, batches: tuple[int, ...] | None, batch: int, evaluations: int, separate: bool, free: int
) -> str:
    """Return the remedy with which a run needs at most `free` bytes.

    The remedy is fewer evaluations at a time if that suffices, otherwise fewer images. batches: the
    supported image counts, None if any count is supported.
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
