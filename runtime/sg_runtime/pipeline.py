"""From a bundle to images: conditioning for a whole run first, then one guided prediction per evaluation."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from sg_runtime import philox
from sg_runtime.arrays import Array, Indices
from sg_runtime.backends import Backend, open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import UsageError
from sg_runtime.guidance import Ramp, choose, guide, with_scale
from sg_runtime.images import to_pixels
from sg_runtime.manifest import GuidanceMode, GuidancePlan, SamplerName
from sg_runtime.requests import check_seeds, check_times, class_index, given_subset, whole_number
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.lanes import LanePool, LaneState
from sg_runtime.run.prepared import PreparedRun, prepare
from sg_runtime.run.sample import Run, check_finite, noise, sample_group
from sg_runtime.sampling import SAMPLERS, Churn, run_times, updates

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

    @overload
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
        on_device: Literal[False] = False,
    ) -> Array: ...

    @overload
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
        on_device: Literal[True],
    ) -> DeviceArray: ...

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
        on_device: bool = False,
    ) -> Array | DeviceArray:
        """Sample one image per class and seed, (B, C, H, W) float32.

        classes: index, name, or None for no class. seeds: 0 to 2**64 - 1; an image depends on its class and seed, not
        on the others: bit for bit where the graphs run at one batch size, to rounding otherwise. guidance: from
        `self.guidance(…)`, by default the bundle's; scale replaces its scale. churn: noise that an edm run adds, for
        which the state comes to the CPU in every such step. fused: use the guided graph where there is one; False
        always runs the two branches by graphs of their own. progress: called when an evaluation has been asked for,
        which on a GPU is before it is done. on_device: return the array where it lies, for
        `torch.from_dlpack`; on the CPU it is NumPy's.

        Raises NonFiniteError where the samples are no numbers, DeviceMemoryError where memory does not suffice, with
        what would fit, and DeviceError where the device is lost. After the first two the pipeline goes on as before.
        """
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
        run = Run(chosen, times[0], updates(sampler, model.prediction, times, churn), steps, fused, self.chunk)
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
            return result if on_device else samples

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
        """Compute conditioning and token subsets of evaluations at `times`, for `guided(x, plan, i)`.

        times: t in [0, 1] of a flow model, sigma above 0 of an edm model. counters: (step, evaluation) of each
        evaluation, for its random subsets; by default (i, 0).
        """
        labels = self._labels(classes)
        check_seeds(seeds, len(labels))
        counters = [(i, 0) for i in range(len(times))] if counters is None else counters
        if len(times) == 0:
            raise UsageError("times: expected at least one, found none")
        if len(counters) != len(times):
            raise UsageError(f"counters: expected one for each of the {len(times)} times, found {len(counters)}")
        for counter in counters:
            if min(whole_number("counter", number) for number in counter) < 0:
                raise UsageError(f"counters: expected (step, evaluation), none below 0, found {counter}")
        chosen = self._scaled(guidance, scale)
        last_step = max(step for step, _ in counters)
        with self._running() as (leased, runner):
            plan = self._prepare(runner, chosen, [float(time) for time in times], labels, seeds, counters, last_step)
            leased.lane.memory.wait()  # another lane may use it
            return plan

    @overload
    def guided(
        self, x: Array, plan: PreparedRun, index: int, /, *, return_branches: Literal[False] = False
    ) -> Array: ...

    @overload
    def guided(
        self, x: Array, plan: PreparedRun, index: int, /, *, return_branches: Literal[True]
    ) -> tuple[Array, Array, Array]: ...

    @overload
    def guided(
        self,
        x: Array,
        t: float,
        classes: Classes,
        /,
        *,
        seeds: Sequence[int] | None = None,
        step: int = 0,
        scale: Ramp | None = None,
        guidance: GuidancePlan | None = None,
        keep_strong: Indices | None = None,
        keep_weak: Indices | None = None,
        return_branches: Literal[False] = False,
    ) -> Array: ...

    @overload
    def guided(
        self,
        x: Array,
        t: float,
        classes: Classes,
        /,
        *,
        seeds: Sequence[int] | None = None,
        step: int = 0,
        scale: Ramp | None = None,
        guidance: GuidancePlan | None = None,
        keep_strong: Indices | None = None,
        keep_weak: Indices | None = None,
        return_branches: Literal[True],
    ) -> tuple[Array, Array, Array]: ...

    def guided(
        self,
        x: Array,
        plan_or_t: PreparedRun | float,
        index_or_classes: int | Classes,
        /,
        *,
        seeds: Sequence[int] | None = None,
        step: int = 0,
        scale: Ramp | None = None,
        guidance: GuidancePlan | None = None,
        keep_strong: Indices | None = None,
        keep_weak: Indices | None = None,
        return_branches: bool = False,
    ) -> Array | tuple[Array, Array, Array]:
        """The guided prediction at x (B, C, H, W) float32, for samplers of one's own: velocity (flow), denoised (edm).

        `guided(x, plan, i)` is evaluation i of a plan from `prepare`. `guided(x, t, classes, …)` prepares for this one
        call at t, or sigma of an edm model: seeds (default 0 to B - 1) and step draw the token subsets, unless
        keep_strong and keep_weak, (B, K) int64 sorted, give them. return_branches: return NumPy's (guided, strong,
        weak). x may be any array on the pipeline's device that speaks DLPack, such as torch's: it is read where it
        lies, and the prediction stays there.
        """
        if isinstance(plan_or_t, PreparedRun):
            plan, index = plan_or_t, whole_number("evaluation", index_or_classes)
            if step or any(value is not None for value in (seeds, scale, guidance, keep_strong, keep_weak)):
                raise UsageError("a plan settles seeds, step, scale, guidance and subsets: give these to prepare")
            if not 0 <= index < len(plan.times):
                raise UsageError(f"evaluation {index}: the plan has 0 to {len(plan.times) - 1}")
            images = len(plan.strong.rows)
        else:
            classes: Classes = index_or_classes  # type: ignore[assignment]
            images = len(classes)
        with self._running() as (leased, runner):
            memory = leased.lane.memory
            held = memory.hold(x)
            self._check_latent(held, images)
            if not isinstance(plan_or_t, PreparedRun):
                chosen = self._scaled(guidance, scale)
                plan, index = self._one_off(runner, plan_or_t, classes, seeds, step, chosen), 0
                plan = self._with_subsets(plan, keep_strong, keep_weak)
            if return_branches:
                strong, weak = (memory.download(found) for found in runner.branches(held, plan, index))
                return guide(strong, weak, plan.scales[index]), strong, weak
            found = runner.prediction(held, plan, index)
            if isinstance(x, np.ndarray):
                return memory.download(found)
            memory.wait()
            return found

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

    def _prepare(
        self,
        runner: GraphRunner,
        guidance: GuidancePlan,
        times: Sequence[float],
        labels: Indices,
        seeds: Sequence[int],
        counters: Sequence[tuple[int, int]],
        last_step: int,
    ) -> PreparedRun:
        manifest = self.bundle.manifest
        check_times(manifest.model, times)
        return prepare(manifest, runner.condition, guidance, times, labels, seeds, counters, last_step)

    def _one_off(
        self,
        runner: GraphRunner,
        t: float,
        classes: Classes,
        seeds: Sequence[int] | None,
        step: int,
        guidance: GuidancePlan,
    ) -> PreparedRun:
        """The plan of one evaluation; what changes over a run is as in the bundle's default number of steps."""
        labels = self._labels(classes)
        seeds = range(len(labels)) if seeds is None else seeds
        check_seeds(seeds, len(labels))
        if whole_number("step", step) < 0:
            raise UsageError(f"step: expected at least 0, found {step}")
        last_step = max(step, self.bundle.manifest.sampling.steps - 1)
        return self._prepare(runner, guidance, [float(t)], labels, seeds, [(step, 0)], last_step)

    def _with_subsets(self, plan: PreparedRun, strong: Indices | None, weak: Indices | None) -> PreparedRun:
        """A plan of one evaluation with the subsets that the caller gives in place of the drawn ones."""
        tokens = self.bundle.manifest.model.tokens
        (drawn_strong,), (drawn_weak,) = plan.strong.keep, plan.weak.keep if plan.weak else (None,)
        keep_strong = given_subset("keep_strong", strong, drawn_strong, tokens)
        keep_weak = given_subset("keep_weak", weak, drawn_weak, tokens)
        return replace(
            plan,
            strong=replace(plan.strong, keep=(keep_strong,)),
            weak=plan.weak and replace(plan.weak, keep=(keep_weak,)),
        )

    def _check_latent(self, x: DeviceArray, images: int) -> None:
        expected = (images, *self.bundle.manifest.model.latent)
        if x.dtype != np.float32 or x.shape != expected:
            raise UsageError(f"x: expected float32 of shape {expected}, found {x.dtype} of shape {x.shape}")
