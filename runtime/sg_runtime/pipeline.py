"""From a bundle to images: conditioning for a whole run first, then one guided prediction per evaluation."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime import philox
from sg_runtime.arrays import Array, Indices
from sg_runtime.backends import Backend, open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import UsageError
from sg_runtime.guidance import Ramp, choose, with_scale
from sg_runtime.images import to_pixels
from sg_runtime.manifest import GuidanceMode, GuidancePlan, SamplerName
from sg_runtime.requests import check_seeds, check_times, class_index, given_subset, whole_number
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.lanes import LanePool, LaneState
from sg_runtime.run.prepared import Batch, PreparedRun, prepare
from sg_runtime.run.sample import Run, check_finite, noise, sample_group
from sg_runtime.sampling import SAMPLERS, Churn, Update, run_times, updates

Classes = Sequence[int | str | None]
Progress = Callable[[int, int], None]
"""(evaluations done, evaluations in all) of a run."""

LOG = logging.getLogger("sg_runtime")

DEFAULT_BATCH = 16


class Pipeline:
    """A bundle ready to run. Safe to use from several threads, which share the weights."""

    def __init__(self, bundle: Bundle, backend: Backend, batch: int, chunk: int | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.batch = batch
        self.chunk = chunk
        self._lanes = LanePool(bundle.manifest, backend)
        self._kept = False

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "auto",
        *,
        backend: str | None = None,
        batch: int | None = None,
        chunk: int | None = None,
        stream: object | None = None,
        capture: bool = True,
        threads: int | None = None,
        verify_hashes: bool = True,
    ) -> "Pipeline":
        """Open the bundle at `bundle` for `device`: "auto", "cpu", "cuda", or "cuda:1" for a GPU by its number.

        backend: one of `sg_runtime.BACKENDS` in place of the best that works here; `choose_backend` says why that is
        it. batch: the most images in one engine run (default 16, or what the bundle was built for). chunk: the
        evaluations whose conditioning is held in the device's memory at a time (default: what 256 MB hold). stream: a
        CUDA stream that all runs go into, in place of own ones: a handle, or an object of torch, CuPy or cuda.core.
        capture: put runs into the stream as CUDA graphs, where the backend can. threads: of a run on the CPU (default:
        all cores); a server that runs several at once gives each a share. verify_hashes: see `Bundle.open`.

        Raises BundleError for a damaged bundle or one that nothing here can run, MissingExtraError without a backend
        library, UsageError for a device, backend or batch that there is not.
        """
        opened = Bundle.open(bundle, verify_hashes=verify_hashes)
        for name, value in {"batch": batch, "chunk": chunk, "threads": threads}.items():
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected at least 1, found {value}")
        fixed = opened.manifest.batch
        if fixed is not None and batch not in (None, fixed):
            raise UsageError(f"batch: the graphs of {bundle} are fixed to {fixed} images, found {batch}")
        plan = opened.manifest.quantization
        if plan is not None and plan.remarks:
            LOG.warning("warning: %s: %s", bundle, "; ".join(plan.remarks))
        opened_backend = open_backend(
            opened, device, backend=backend, batch=batch, stream=stream, capture=capture, threads=threads
        )
        sizes = opened_backend.batches
        return cls(opened, opened_backend, batch or (DEFAULT_BATCH if sizes is None else max(sizes)), chunk)

    def warmup(self, images: int = 1, *, steps: int | None = None, guidance: GuidancePlan | None = None) -> None:
        """Sample `images` images that nobody sees, as later runs of as many will be: what those need is then there.

        Graphs and engines are opened, buffers allocated; on a GPU kernels are compiled and CUDA graphs captured, for
        which it samples twice. steps, guidance: see `sample`.
        """
        for _ in range(1 if self.backend.name == "onnxruntime-cpu" else 2):
            self.sample([None] * images, range(images), steps=steps, guidance=guidance)
        self.backend.keep()

    def release(self) -> None:
        """Give back the buffers of all lanes that are idle; later runs allocate anew."""
        self._lanes.release()

    def guidance(
        self,
        mode: GuidanceMode | None = None,
        *,
        strong_sparsity: Ramp | None = None,
        sparsity: Ramp | None = None,
        scale: Ramp | None = None,
        interval: tuple[float, float] | None = None,
    ) -> GuidancePlan:
        """The bundle's guidance plan with the given parts replaced; `sparsity` is the weak branch's.

        A pair in place of a number goes along a cosine from the first step's to the last step's. interval: the times
        (t, or sigma of an edm model) between which guidance applies. Raises UsageError for what this bundle was not
        built for, naming the build that would serve.
        """
        return choose(
            self.bundle.manifest,
            mode=mode,
            strong_sparsity=strong_sparsity,
            sparsity=sparsity,
            scale=scale,
            interval=interval,
        )

    def __call__(
        self,
        classes: Classes,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        scale: Ramp | None = None,
        sampler: SamplerName | None = None,
        guidance: GuidancePlan | None = None,
        churn: Churn | None = None,
        decode: Callable[[Array], NDArray[Any]] | None = None,
        progress: Progress | None = None,
    ) -> NDArray[Any]:
        """One image per class and seed; see `sample` for the arguments.

        Returns (B, H, W, C) uint8 for pixel models, `decode(latents)` where it is given, else latents (B, C, H, W).
        """
        x = self.sample(
            classes,
            seeds,
            steps=steps,
            scale=scale,
            sampler=sampler,
            guidance=guidance,
            churn=churn,
            progress=progress,
        )
        if decode is not None:
            return decode(x)
        return self.decode(x) if self.bundle.manifest.model.space == "pixel" else x

    def sample(
        self,
        classes: Classes,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        scale: Ramp | None = None,
        sampler: SamplerName | None = None,
        guidance: GuidancePlan | None = None,
        churn: Churn | None = None,
        fused: bool = True,
        progress: Progress | None = None,
    ) -> Array:
        """Sample one image per class and seed, (B, C, H, W) float32.

        classes: index, name, or None for no class.
        seeds: 0 to 2**64 - 1. An image depends on its class and seed, not on the others: bit for bit if the graphs run
        at one batch size, to rounding otherwise.
        steps, sampler: by default the bundle's.
        guidance: from `self.guidance(…)`, by default the bundle's. scale: replaces its scale.
        churn: noise that an edm run adds; the state comes to the CPU in every such step.
        fused: use the guided graph if there is one; False always runs each branch by its own graph.
        progress: called when an evaluation has been submitted, which on a GPU is before it is done.

        Raises UsageError for arguments that the bundle cannot serve, NonFiniteError if a sample is not finite,
        DeviceMemoryError with what would fit if memory does not suffice, DeviceError if the device is lost. The
        pipeline stays usable after all but the last.
        """
        _, samples = self._sample(classes, seeds, steps, scale, sampler, guidance, churn, fused, progress)
        return samples

    def sample_on_device(
        self,
        classes: Classes,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        scale: Ramp | None = None,
        sampler: SamplerName | None = None,
        guidance: GuidancePlan | None = None,
        churn: Churn | None = None,
        fused: bool = True,
        progress: Progress | None = None,
    ) -> DeviceArray:
        """Sample as `sample` does, and leave the samples on the pipeline's device, for `torch.from_dlpack`."""
        samples, _ = self._sample(classes, seeds, steps, scale, sampler, guidance, churn, fused, progress)
        return samples

    def _sample(
        self,
        classes: Classes,
        seeds: Sequence[int],
        steps: int | None,
        scale: Ramp | None,
        sampler: SamplerName | None,
        guidance: GuidancePlan | None,
        churn: Churn | None,
        fused: bool,
        progress: Progress | None,
    ) -> tuple[DeviceArray, Array]:
        """The samples on the device and on the CPU."""
        defaults = self.bundle.manifest.sampling
        steps = defaults.steps if steps is None else steps
        sampler = sampler or defaults.sampler
        if whole_number("steps", steps) < 1:
            raise UsageError(f"steps: expected at least 1, found {steps}")
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler: expected one of {', '.join(SAMPLERS)}, found {sampler!r}")
        chosen = self._scaled(guidance, scale)
        labels = self._labels(classes)
        check_seeds(seeds, len(labels))
        model = self.bundle.manifest.model
        if churn is not None and model.prediction != "edm":
            raise UsageError(f"churn: expected an edm model, found one of {model.prediction} prediction")
        times = run_times(steps, defaults.karras)
        run = Run(chosen, times[0], updates(sampler, model.prediction, times, churn), fused, self.chunk)
        with self._running() as (leased, runner):
            memory, groups, finished = leased.lane.memory, list(runner.groups(len(labels))), count(1)

            def done() -> None:
                if progress is not None:
                    progress(next(finished), len(run.updates) * len(groups))

            result = None
            for group in groups:
                own = [seeds[image] for image in group]
                state = sample_group(self.bundle.manifest, leased, runner, run, labels[group], own, done)
                if result is None:  # the first workspace has found that there is memory
                    result = memory.empty((len(labels), *state.shape[1:]), np.float32)
                first, images = int(group[0]), len(np.unique(group))
                memory.copy(state[:images], result[first : first + images])
            assert result is not None
            samples = memory.download(result)
            check_finite(samples, self.bundle, self.backend.name)
            if not self._kept:
                self._kept = True
                self.backend.keep()
            return result, samples

    def initial_noise(self, seeds: Sequence[int]) -> Array:
        """Standard normal noise, (B, C, H, W) float32; row k is that of seeds[k].

        A flow run starts from it, an edm run from its product with the highest sigma.
        """
        return noise(self.bundle.manifest, seeds, philox.INITIAL_NOISE)

    def prepare(
        self,
        times: Sequence[float] | Array,
        classes: Classes,
        seeds: Sequence[int],
        *,
        counters: Sequence[tuple[int, int]] | None = None,
        guidance: GuidancePlan | None = None,
        scale: Ramp | None = None,
    ) -> PreparedRun:
        """Compute the conditioning and the kept tokens of evaluations at `times`, for `guided` and `branches`.

        times: t in [0, 1] of a flow model, sigma above 0 of an edm model.
        counters: (step, evaluation) of each evaluation, for its kept tokens; by default (i, 0).
        classes, seeds, guidance, scale: see `sample`.
        """
        counters = [(i, 0) for i in range(len(times))] if counters is None else counters
        if len(times) == 0:
            raise UsageError("times: expected at least one, found none")
        if len(counters) != len(times):
            raise UsageError(f"counters: expected one for each of the {len(times)} times, found {len(counters)}")
        for counter in counters:
            if min(whole_number("counter", number) for number in counter) < 0:
                raise UsageError(f"counters: expected (step, evaluation), none below 0, found {counter}")
        places = [Update(*counter, float(time), 0.0, 1.0, 0.0) for counter, time in zip(counters, times, strict=True)]
        return self._prepare(places, classes, seeds, self._scaled(guidance, scale))

    def prepare_once(
        self,
        t: float,
        classes: Classes,
        *,
        seeds: Sequence[int] | None = None,
        step: int = 0,
        guidance: GuidancePlan | None = None,
        scale: Ramp | None = None,
        keep_strong: Indices | None = None,
        keep_weak: Indices | None = None,
    ) -> PreparedRun:
        """Prepare a single evaluation at `t`, or sigma of an edm model.

        seeds: by default 0 to B - 1. step: draws the kept tokens, and says how far guidance that changes over a run of
        the bundle's default length has come. keep_strong, keep_weak: (B, K) int64 sorted, in place of the drawn ones.
        """
        if whole_number("step", step) < 0:
            raise UsageError(f"step: expected at least 0, found {step}")
        last_step = max(step, self.bundle.manifest.sampling.steps - 1)
        seeds = range(len(classes)) if seeds is None else seeds
        chosen = self._scaled(guidance, scale)
        run = self._prepare([Update(step, 0, float(t), 0.0, 1.0, 0.0)], classes, seeds, chosen, last_step)
        branches = []
        for name, own, branch in zip_longest(("keep_strong", "keep_weak"), (keep_strong, keep_weak), run.branches):
            drawn = None if branch is None else branch.keep[0]
            keep = given_subset(name, own, drawn, self.bundle.manifest.model.tokens)
            branches += [] if branch is None else [replace(branch, keep=(keep,))]
        return replace(run, branches=tuple(branches))

    def guided(self, x: Array, run: PreparedRun, index: int = 0) -> Array:
        """The guided prediction of an evaluation at x (B, C, H, W) float32: velocity (flow) or denoised image (edm).

        For samplers of your own. x may be any array on the pipeline's device that speaks DLPack, such as torch's: it is
        read in place, and the prediction stays on the device.
        """
        with self._evaluating(x, run, index) as (leased, runner, held):
            found = runner.prediction(held, run, index)
            if isinstance(x, np.ndarray):
                return leased.lane.memory.download(found)
            leased.lane.memory.wait()
            return found

    def branches(self, x: Array, run: PreparedRun, index: int = 0) -> tuple[Array, Array]:
        """The predictions of the strong and the weak branch at x, each by its own graph, as NumPy arrays.

        `guide(strong, weak, run.scales[index])` combines them. Raises UsageError if the strong branch runs alone.
        """
        with self._evaluating(x, run, index) as (leased, runner, held):
            strong, weak = (leased.lane.memory.download(found) for found in runner.branches(held, run, index))
            return strong, weak

    def decode(self, x: Array) -> NDArray[np.uint8]:
        """Pixels of a pixel model: (B, C, H, W) float32 in [-1, 1] → (B, H, W, C) uint8.

        Raises UsageError for a latent model, whose decoder is not part of the bundle.
        """
        if self.bundle.manifest.model.space == "latent":
            raise UsageError(
                f"{self.bundle.path}: expected a pixel model, found one of latents, and no decoder is in the bundle: "
                f"pass decode=, or keep the latents"
            )
        return to_pixels(x)

    def _scaled(self, guidance: GuidancePlan | None, scale: Ramp | None) -> GuidancePlan:
        plan = self.bundle.manifest.guidance if guidance is None else guidance
        return plan if scale is None else with_scale(plan, scale)

    def _labels(self, classes: Classes) -> Indices:
        """Class indices, (B,) int64."""
        if len(classes) == 0:
            raise UsageError("classes: expected at least one, found none")
        return np.array([class_index(self.bundle.manifest.model, name) for name in classes], dtype=np.int64)

    @contextmanager
    def _running(self) -> Iterator[tuple[LaneState, GraphRunner]]:
        """A lane for this thread, and what runs graphs in it."""
        with self._lanes.lease() as leased:
            yield leased, GraphRunner(self.bundle.manifest, leased.lane, self.batch, self.backend.batches)

    @contextmanager
    def _evaluating(
        self, x: Array, run: PreparedRun, index: int
    ) -> Iterator[tuple[LaneState, GraphRunner, DeviceArray]]:
        """A lane for this thread, and x on its device. Raises UsageError for an x or an index that does not fit."""
        if not 0 <= whole_number("evaluation", index) < len(run.times):
            raise UsageError(f"evaluation {index}: the prepared run has 0 to {len(run.times) - 1}")
        with self._running() as (leased, runner):
            held = leased.lane.memory.hold(x)
            expected = (run.images, *self.bundle.manifest.model.latent)
            if held.dtype != np.float32 or held.shape != expected:
                raise UsageError(f"x: expected float32 of shape {expected}, found {held.dtype} of shape {held.shape}")
            yield leased, runner, held

    def _prepare(
        self,
        places: Sequence[Update],
        classes: Classes,
        seeds: Sequence[int],
        guidance: GuidancePlan,
        last_step: int | None = None,
    ) -> PreparedRun:
        batch = Batch(self._labels(classes), seeds)
        check_seeds(seeds, len(batch.labels))
        manifest = self.bundle.manifest
        check_times(manifest.model, [update.time for update in places])
        with self._running() as (leased, runner):
            run = prepare(manifest, runner.condition, guidance, places, batch, last_step)
            leased.lane.memory.wait()  # another lane may use it
            return run
