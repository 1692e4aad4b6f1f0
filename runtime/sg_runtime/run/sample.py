"""Complete runs from noise to samples.

The conditioning is computed in chunks of evaluations, as memory allows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sg_runtime import philox
from sg_runtime.arrays import Array
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import DeviceMemoryError, NonFiniteError
from sg_runtime.manifest import GuidancePlan, Manifest
from sg_runtime.run.budget import largest, run_bytes
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.lanes import LaneState
from sg_runtime.run.prepared import Batch, per_image, prepare
from sg_runtime.sampling import Update

CHUNK_BYTES = 256 << 20
"""Memory budget in bytes of a chunk of evaluations if `Run.chunk` is None."""


@dataclass(frozen=True, slots=True)
class Run:
    """Parameters of a sampling run.

    guidance: guidance of the run.
    start: standard deviation of the state at the start.
    updates: updates from there on.
    fused: whether a fused graph of both branches is used if the bundle has it.
    chunk: number of evaluations whose conditioning is held at a time; None for the largest number
        that fits into CHUNK_BYTES.
    """

    guidance: GuidancePlan
    start: float
    updates: tuple[Update, ...]
    fused: bool
    chunk: int | None


def sample_group(
    manifest: Manifest,
    leased: LaneState,
    runner: GraphRunner,
    run: Run,
    batch: Batch,
    done: Callable[[], None],
) -> DeviceArray:
    """Sample one engine batch. Return a buffer that the next run overwrites.

    done: called after each evaluation is submitted. Raises DeviceMemoryError if the memory does not
    suffice; the message names the remedy.
    """
    separate, seeds, images = run.guidance.row.separate, batch.seeds, len(batch.seeds)
    size = _chunk(manifest, run, images, separate)
    workspace = leased.workspace(images, size, separate)
    workspace.start(np.float32(run.start) * noise(manifest, seeds, philox.INITIAL_NOISE))
    try:
        shared, last_step = per_image(manifest, runner.hoist, run.guidance, batch.conditions), run.updates[-1].step
        for first in range(0, len(run.updates), size):
            part = run.updates[first : first + size]
            prepared = prepare(manifest, runner.hoist, run.guidance, part, batch, last_step, shared)
            workspace.advance(prepared, part, done, lambda step: noise(manifest, seeds, philox.CHURN, step), run.fused)
            del prepared  # free it before the next one is computed
    except DeviceMemoryError as error:
        smaller = [size for size in runner.batches or (images // 2,) if 0 < size < images]
        remedy = f"try Pipeline.load(…, batch={max(smaller)})" if smaller else "free some memory"
        raise DeviceMemoryError(f"{error}; runs of {images} images do not fit here: {remedy}") from error
    return workspace.state


def noise(manifest: Manifest, seeds: Sequence[int], purpose: int, step: int = 0) -> Array:
    """Return standard normal noise in the shape of the state, (B, C, H, W) float32, by seed."""
    shape = manifest.model.latent
    return np.stack([philox.normal(seed, purpose, shape, step=step) for seed in seeds])


def check_finite(samples: Array, bundle: Bundle, backend: str) -> None:
    """Raise NonFiniteError if a sample has NaN or infinite values."""
    bad = [image for image, sample in enumerate(samples) if not np.isfinite(sample).all()]
    if bad:
        precision = bundle.manifest.precision_name
        remedy = "lower the scale" if precision == "fp32" else "lower the scale, or build with bf16 or fp32"
        raise NonFiniteError(
            f"{bundle.path}: {backend} in {precision}: expected finite samples, found NaN or infinity in {len(bad)} of "
            f"{len(samples)} (images {', '.join(map(str, bad[:8]))}{', …' * (len(bad) > 8)}); {remedy}, or find the "
            f"cause with sg-export verify"
        )


def _chunk(manifest: Manifest, run: Run, batch: int, separate: bool) -> int:
    """Return the number of evaluations whose conditioning is held at a time."""
    if run.chunk is not None:
        return min(run.chunk, len(run.updates))
    return largest(lambda size: run_bytes(manifest, batch, size, separate) <= CHUNK_BYTES, len(run.updates)) or 1
