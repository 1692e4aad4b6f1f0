"""Samples images from a bundle: first the conditioning of a run, then its guided evaluations."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sg_runtime import philox
from sg_runtime.arrays import Array, Indices
from sg_runtime.backends import Backend, open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Classes, Conditions, examples, of_prompts, parse
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.guidance import Ramp, choose, levels, with_scale
from sg_runtime.images import to_pixels
from sg_runtime.manifest import GuidanceMode, GuidancePlan, Manifest, Part, SamplerName, SubsetRule, size_text
from sg_runtime.manifest.base import choice, flag, items, number, whole_number
from sg_runtime.requests import (
    check_times,
    checked_prompts,
    checked_seeds,
    expect,
    expect_callable,
    given_subset,
    image_rows,
)
from sg_runtime.run.encode import Encoded
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.lanes import LaneState
from sg_runtime.run.opened import Keep, OpenParts, telling_needs
from sg_runtime.run.prepared import Batch, PreparedRun, prepare
from sg_runtime.run.sample import Run, check_finite, noise, sample_group
from sg_runtime.sampling import SAMPLERS, Churn, Update, trajectory

Progress = Callable[[int, int], None]
"""Called with (evaluations done, evaluations in total) of a run."""

LOG = logging.getLogger("sg_runtime")

DEFAULT_BATCH = 16


class Pipeline:
    """A bundle ready to run. Safe to use from several threads; they share the weights.

    It samples at one size, `bundle.manifest.model.size`. `at` returns a pipeline of another size.
    """

    def __init__(self, bundle: Bundle, backend: Backend, batch: int, chunk: int | None = None) -> None:
        self.bundle = bundle
        self.batch = batch
        self.chunk = chunk
        self._opened = OpenParts(bundle, backend, None, "all")
        self._arguments: dict[str, Any] | None = None

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        device: str = "auto",
        *,
        backend: str | None = None,
        batch: int | None = None,
        chunk: int | None = None,
        stream: object | None = None,
        capture: bool = True,
        threads: int | None = None,
        keep: Keep = "all",
        verify_hashes: bool = True,
    ) -> "Pipeline":
        """Open a bundle on a device.

        Files are read when they are first needed. A file that was changed since then raises
        BundleError, in this call or in a later run.

        bundle: path of the bundle, or a bundle that `Bundle.open` returned.
        device: "auto", "cpu", "cuda", or a GPU by number, such as "cuda:1".
        backend: one of `sg_runtime.BACKENDS`; by default the best one that works on this machine.
        `choose_backend` reports the reasons for the choice.
        batch: maximum number of images in one engine run; by default 16, or the largest batch size
        that the bundle was built for.
        chunk: number of evaluations whose conditioning is held in device memory at a time; by
        default the number that fits in 256 MB.
        stream: CUDA stream for all runs, instead of streams of the pipeline: a handle, or a stream
        object of torch, CuPy or cuda.core.
        capture: whether to launch runs as CUDA graphs, if the backend supports it.
        threads: number of CPU threads per run; by default one for each core that the process may
        use. A server with several concurrent runs gives each run a share of the cores.
        keep: parts of a text-to-image bundle that stay open after use: "all"; "step", which closes
        text encoder and decoder; or "one", which has one part open at a time and opens it again
        for every use. A closed part takes no memory.
        verify_hashes: see `Bundle.open`.

        Raises BundleError if the bundle is damaged or no backend on this machine can run it,
        MissingExtraError if a backend library is not installed, and UsageError if the device,
        backend or batch does not exist.
        """
        flag("verify_hashes", verify_hashes)
        flag("capture", capture)
        choice("keep", keep, get_args(Keep))
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify_hashes=verify_hashes)
        for name, value in {"batch": batch, "chunk": chunk, "threads": threads}.items():
            if value is not None and whole_number(name, value) < 1:
                raise UsageError(f"{name}: expected at least 1, found {value}")
        fixed = opened.manifest.batch
        if fixed is not None and batch not in (None, fixed):
            raise UsageError(f"batch: the graphs of {opened.path} are fixed to {fixed} images, found {batch}")
        plan = opened.manifest.quantization
        if plan is not None and plan.remarks:
            LOG.warning("%s: %s", opened.path, "; ".join(plan.remarks))

        def opener(part: Part, name: str | None = backend) -> Backend:
            """Open a part. name: backend; None to choose one."""
            return open_backend(
                opened,
                device,
                backend=name,
                batch=batch if part == "step" else None,
                stream=stream,
                capture=capture and part == "step",
                threads=threads,
                part=opened.manifest.parts.get(part),
            )

        with telling_needs(opened):
            step = opener("step")
        sizes = step.batches
        pipe = cls(opened, step, batch or (DEFAULT_BATCH if sizes is None else max(sizes)), chunk)
        pipe._opened = OpenParts(opened, step, partial(opener, name=step.name), keep)
        pipe._arguments = {
            "device": device,
            "backend": backend,
            "batch": batch,
            "chunk": chunk,
            "stream": stream,
            "capture": capture,
            "threads": threads,
            "keep": keep,
            "verify_hashes": verify_hashes,
        }
        return pipe

    @property
    def backend(self) -> Backend:
        """The backend that runs the denoiser at this size. It is opened if it is not."""
        return self._opened.step(self.bundle)[0]

    def __reduce__(self) -> tuple[Callable[..., "Pipeline"], tuple[Any, ...]]:
        """Pickle the pipeline as the arguments of `load`.

        Unpickling opens the bundle again and raises BundleError if its manifest has changed.
        Raises UsageError for a pipeline that `load` did not make, or that has a CUDA stream.
        """
        if self._arguments is None or self._arguments["stream"] is not None:
            found = "one that load did not make" if self._arguments is None else "one with a stream"
            raise UsageError(
                f"pickle: expected a pipeline of Pipeline.load without a stream, found {found}: load the bundle in "
                f"the other process"
            )
        first = self._opened.bundle
        return _load_again, (first.root, first.manifest, self.bundle.manifest.model.size, self._arguments)

    def at(self, height: int, width: int) -> "Pipeline":
        """Return a pipeline of another size that the bundle was built for.

        height, width: of the picture in pixels, or of a sample if its pixels are unknown; see
        `bundle.manifest.model.size`.

        Both pipelines share backend, weights and the number of lanes. Engines of TensorRT hold
        weights of their own for each size; those of a size are opened when it is first asked for,
        and stay open. Buffers are freed by the `release` of their own size. Raises UsageError for a
        size that was not built; the message gives the build command that adds it.
        """
        made = Pipeline.__new__(Pipeline)
        vars(made).update(vars(self))  # copy() would load the bundle again
        made.bundle = self._opened.bundle.at(height, width)
        self._opened.step(made.bundle)
        return made

    def warmup(self, images: int = 1, *, steps: int | None = None, guidance: GuidancePlan | None = None) -> None:
        """Sample `images` images and discard them, to set up later runs of the same size.

        Opens graphs and engines and allocates buffers. On a GPU it samples twice, to compile
        kernels and capture CUDA graphs. Text encoder and decoder run once, too. steps, guidance:
        see `sample`.
        """
        if whole_number("images", images) < 1:
            raise UsageError(f"images: expected at least 1, found {images}")
        for _ in range(1 if self._opened.name == "onnxruntime-cpu" else 2):
            conditions = examples(self.bundle.manifest.model, images)
            x = self.sample(conditions, range(images), steps=steps, guidance=guidance)
        if self.bundle.manifest.text_graph is not None:
            self.encode([None])
        if self.bundle.manifest.decode_graph is not None:
            self.decode(x[:1])

    def release(self) -> None:
        """Free the buffers of all idle lanes, and close text encoder and decoder.

        Later runs allocate and open them again.
        """
        self._opened.release(self.bundle)

    def guidance(
        self,
        mode: GuidanceMode | None = None,
        *,
        strong_sparsity: Ramp | None = None,
        sparsity: Ramp | None = None,
        scale: Ramp | None = None,
        interval: tuple[float, float] | None = None,
        subset: SubsetRule | None = None,
    ) -> GuidancePlan:
        """Return the bundle's guidance plan with the given parts replaced.

        A pair instead of a number changes along a cosine from the first step to the last step.
        sparsity: sparsity of the weak branch.
        interval: lowest and highest time (t, or sigma of an edm model) at which guidance applies.
        subset: "fresh" to draw kept tokens in every evaluation, "fixed" to draw them once per run.
        Raises UsageError if this bundle was not built for the plan; the message gives the build
        command that adds it.
        """
        return choose(
            self.bundle.manifest,
            mode=mode,
            strong_sparsity=strong_sparsity,
            sparsity=sparsity,
            scale=scale,
            interval=interval,
            subset=subset,
        )

    def prompts(
        self,
        prompt_embeds: object,
        prompt_mask: object = None,
        *,
        negative_embeds: object = None,
        negative_mask: object = None,
        images: int | None = None,
    ) -> Conditions:
        """Return prompts of a text model, to sample with.

        prompt_embeds: (P, L, C) floats, the embeddings of P prompts by the model's text encoder. L
        and C are those of `bundle.manifest.model.conditions`. NumPy arrays, or arrays of another
        library on the CPU.
        prompt_mask: (P, L), 1 for a token and 0 for padding; by default no padding.
        negative_embeds, negative_mask: prompts of the weak branch in the guidance cfg and cfg+sg,
        usually the encoding of an empty prompt.
        images: number of images. One prompt, or one negative prompt, serves all of them; otherwise
        there is one for each. By default P.

        Raises UsageError if the model takes no text, or for arrays of another shape or type.
        """
        if images is not None and whole_number("images", images) < 1:
            raise UsageError(f"images: expected at least 1, found {images}")
        model = self.bundle.manifest.model
        return of_prompts(model, prompt_embeds, prompt_mask, negative_embeds, negative_mask, images)

    def encode(self, prompts: Sequence[str | None]) -> Encoded:
        """Return embeddings (P, L, C) float32 and mask (P, L) int64 of P prompts, for `prompts`.

        prompts: texts; None or "" for no prompt. They are cleaned and cut as the model's own
        pipeline does, with a warning for each that is cut. The same prompt is encoded once, while
        it is among the last 32.

        Raises UsageError if the bundle has no text encoder, or for a text without words, and
        MissingExtraError without the extra text.
        """
        return self._opened.encode(checked_prompts("prompts", prompts, empty=True))

    def from_text(
        self,
        prompts: str | Sequence[str | None],
        negative: str | Sequence[str | None] | None = None,
        *,
        images: int | None = None,
    ) -> Conditions:
        """Return prompts that are given as text, to sample with; see `encode`.

        negative: prompts of the weak branch in the guidance cfg and cfg+sg; "" for no prompt. By
        default there are none.
        images: number of images. One prompt, or one negative prompt, serves all of them; otherwise
        there is one for each. By default one for each prompt.
        """
        texts = checked_prompts("prompts", prompts)
        others = None if negative is None else checked_prompts("negative", negative, empty=True)
        rows = image_rows("prompts", len(texts), images or len(texts))
        distinct = list(dict.fromkeys([*texts, *(others or ())]))
        strong = np.array([distinct.index(text) for text in texts])[rows]
        weak = None
        if others is not None:
            weak = np.array([distinct.index(text) for text in others])
            weak = weak[image_rows("negative", len(others), len(rows))]
        embeds, mask = self._opened.encode(distinct)
        return Conditions({"embeddings": embeds, "mask": mask}, strong, weak)

    def __call__(
        self,
        classes: Classes | Conditions | None = None,
        seeds: Sequence[int] = (),
        *,
        prompts: str | Sequence[str | None] | None = None,
        negative: str | Sequence[str | None] | None = None,
        prompt_embeds: object = None,
        prompt_mask: object = None,
        negative_embeds: object = None,
        negative_mask: object = None,
        steps: int | None = None,
        scale: Ramp | None = None,
        sampler: SamplerName | None = None,
        guidance: GuidancePlan | None = None,
        churn: Churn | None = None,
        decode: Callable[[Array], NDArray[Any]] | None = None,
        progress: Progress | None = None,
    ) -> NDArray[Any]:
        """Sample and decode one image per seed. See `sample` for the other arguments.

        classes: for a class model, the class of each image.
        prompts, negative: for a text model with a text encoder, see `from_text`. The default of
        `negative` in the guidance cfg and cfg+sg is no prompt.
        prompt_embeds, prompt_mask, negative_embeds, negative_mask: for a text model, see `prompts`.
        decode: turns samples (B, C, H, W) float32 into images.
        Returns the result of `decode` if given. Otherwise returns images, (B, H, W, C) uint8, or
        latents (B, C, H, W) float32 if the model samples latents and the bundle has no decoder.
        """
        expect_callable("decode", decode)
        embedded = (prompt_embeds, prompt_mask, negative_embeds, negative_mask)
        kinds = {
            "classes": classes is not None,
            "prompts": prompts is not None or negative is not None,
            "prompt_embeds": any(value is not None for value in embedded),
        }
        if sum(kinds.values()) > 1:
            found = " and ".join(name for name, given in kinds.items() if given)
            raise UsageError(f"expected one of {', '.join(kinds)}, found {found}")
        conditions: Classes | Conditions = () if classes is None else classes
        if kinds["prompts"]:
            if negative is None and self._scaled(guidance, scale).row.null_weak:
                negative = ""
            given = () if prompts is None else prompts
            conditions = self.from_text(given, negative, images=len(checked_seeds(seeds)))
        elif kinds["prompt_embeds"]:
            conditions = self.prompts(
                *embedded[:2],
                negative_embeds=negative_embeds,
                negative_mask=negative_mask,
                images=len(checked_seeds(seeds)),
            )
        x = self.sample(
            conditions,
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
        return self.decode(x) if self.gives_images else x

    def sample(
        self,
        classes: Classes | Conditions,
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
        """Sample one image per condition and seed, (B, C, H, W) float32.

        classes: for a class model, index, name, or None for no class, of each image; for a text
        model, what `prompts` returns.
        seeds: 0 to 2**64 - 1. An image depends on its condition and seed, not on the other images:
        bit for bit if the graphs run at one batch size, up to rounding otherwise.
        steps, sampler: by default those of the bundle.
        guidance: plan from `self.guidance(…)`; by default the bundle's plan.
        scale: guidance scale that replaces the plan's scale.
        churn: noise added to an edm run. Each step that adds noise copies the state to the CPU.
        fused: whether to use the guided graph if there is one. False runs each branch by its graph.
        progress: called after each evaluation is submitted. A GPU may still be computing it.

        Raises UsageError if the bundle cannot serve the arguments, NonFiniteError if a sample is
        not finite, DeviceMemoryError if memory is too small (the message gives a size that fits),
        and DeviceError if the device is lost. The pipeline stays usable unless the device is lost.
        """
        _, samples = self._sample(classes, seeds, steps, scale, sampler, guidance, churn, fused, progress)
        return samples

    def sample_on_device(
        self,
        classes: Classes | Conditions,
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
        """Sample like `sample`, but leave the samples on the device of the pipeline.

        `torch.from_dlpack` accepts the result.
        """
        samples, _ = self._sample(classes, seeds, steps, scale, sampler, guidance, churn, fused, progress)
        return samples

    def _sample(
        self,
        classes: Classes | Conditions,
        seeds: Sequence[int],
        steps: int | None,
        scale: Ramp | None,
        sampler: SamplerName | None,
        guidance: GuidancePlan | None,
        churn: Churn | None,
        fused: bool,
        progress: Progress | None,
    ) -> tuple[DeviceArray, Array]:
        """Return the samples twice: on the device and on the CPU."""
        defaults = self.bundle.manifest.sampling
        steps = defaults.steps if steps is None else steps
        steps = whole_number("steps", steps)
        if steps < 1:
            raise UsageError(f"steps: expected at least 1, found {steps}")
        sampler = choice("sampler", defaults.sampler if sampler is None else sampler, SAMPLERS)
        flag("fused", fused)
        expect_callable("progress", progress)
        expect("churn", churn, Churn, "a Churn")
        chosen = self._scaled(guidance, scale)
        model = self.bundle.manifest.model
        conditions = parse(model, classes)
        seeds = checked_seeds(seeds, len(conditions))
        if churn is not None and model.prediction != "edm":
            raise UsageError(f"churn: expected an edm model, found a model of {model.prediction}")
        path = trajectory(replace(defaults, steps=steps, sampler=sampler), model.prediction, churn)
        run = Run(chosen, path.start, path.updates, fused, self.chunk)
        with self._running() as (leased, runner):
            memory, groups, finished = leased.lane.memory, list(runner.groups(len(conditions))), count(1)

            def done() -> None:
                if progress is not None:
                    progress(next(finished), len(run.updates) * len(groups))

            result = None
            for group in groups:
                batch = Batch(conditions.of(group, weak=chosen.row.null_weak), [seeds[image] for image in group])
                state = sample_group(self.bundle.manifest, leased, runner, run, batch, done)
                if result is None:  # the first workspace has checked the free memory
                    result = memory.empty((len(conditions), *state.shape[1:]), np.float32)
                first, images = int(group[0]), len(np.unique(group))
                memory.copy(state[:images], result[first : first + images])
            assert result is not None
            samples = memory.download(result)
            check_finite(samples, self.bundle, self._opened.name)
            return result, samples

    def initial_noise(self, seeds: Sequence[int]) -> Array:
        """Return standard normal noise, (B, C, H, W) float32; row k belongs to seeds[k].

        A flow run starts from this noise, an edm run from the noise times the highest sigma.
        """
        return noise(self.bundle.manifest, checked_seeds(seeds), philox.INITIAL_NOISE)

    def prepare(
        self,
        times: Sequence[float] | Array,
        classes: Classes | Conditions,
        seeds: Sequence[int],
        *,
        counters: Sequence[tuple[int, int]] | None = None,
        guidance: GuidancePlan | None = None,
        scale: Ramp | None = None,
    ) -> PreparedRun:
        """Compute the conditioning and kept tokens of evaluations, for `guided` and `branches`.

        times: time of each evaluation: t in [0, 1] of a flow model, sigma above 0 of an edm model.
        counters: (step, evaluation) of each evaluation, which determines the kept tokens that are
        drawn; by default (i, 0).
        classes, seeds, guidance, scale: see `sample`.
        """
        at = [number("times", time) for time in items("times", times, "a sequence of numbers")]
        counters = [(i, 0) for i in range(len(at))] if counters is None else counters
        counters = items("counters", counters, "a sequence of (step, evaluation)")
        if len(at) == 0:
            raise UsageError("times: expected at least one, found none")
        if len(counters) != len(at):
            raise UsageError(f"counters: expected one for each of the {len(at)} times, found {len(counters)}")
        places = []
        for counter, time in zip(counters, at, strict=True):
            found = [whole_number("counter", value) for value in items("counters", counter, "(step, evaluation)")]
            if len(found) != 2 or min(found) < 0:
                raise UsageError(f"counters: expected (step, evaluation), both at least 0, found {counter}")
            places.append(Update(found[0], found[1], time, 0.0, 1.0, 0.0))
        return self._prepare(places, classes, seeds, self._scaled(guidance, scale))

    def prepare_once(
        self,
        t: float,
        classes: Classes | Conditions,
        *,
        seeds: Sequence[int] | None = None,
        step: int = 0,
        guidance: GuidancePlan | None = None,
        scale: Ramp | None = None,
        keep_strong: Indices | None = None,
        keep_weak: Indices | None = None,
    ) -> PreparedRun:
        """Prepare a single evaluation.

        t: time of the evaluation, or sigma of an edm model.
        seeds: by default 0 to B - 1.
        step: index that determines the drawn kept tokens. If guidance changes over a run, it also
        sets the position in a run of the bundle's default length.
        keep_strong, keep_weak: kept tokens (B, K), int64, sorted; by default drawn.
        """
        if whole_number("step", step) < 0:
            raise UsageError(f"step: expected at least 0, found {step}")
        last_step = max(step, self.bundle.manifest.sampling.steps - 1)
        conditions = parse(self.bundle.manifest.model, classes)
        seeds = range(len(conditions)) if seeds is None else seeds
        chosen = self._scaled(guidance, scale)
        run = self._prepare([Update(step, 0, number("t", t), 0.0, 1.0, 0.0)], conditions, seeds, chosen, last_step)
        branches = []
        for name, given, branch in zip_longest(("keep_strong", "keep_weak"), (keep_strong, keep_weak), run.branches):
            drawn = None if branch is None else branch.keep[0]
            keep = given_subset(name, given, drawn, self.bundle.manifest.model.tokens)
            branches += [] if branch is None else [replace(branch, keep=(keep,))]
        return replace(run, branches=tuple(branches))

    def guided(self, x: Array, run: PreparedRun, index: int = 0) -> Array:
        """Return the guided prediction at x: velocity (flow) or denoised image (edm).

        Use it in a custom sampler. x is (B, C, H, W) float32. A DLPack array on the device of the
        pipeline, such as a torch tensor, is read in place, and the prediction stays on the device.
        """
        with self._evaluating(x, run, index) as (leased, runner, held):
            prediction = runner.prediction(held, run, index)
            if isinstance(x, np.ndarray):
                return leased.lane.memory.download(prediction)
            leased.lane.memory.wait()
            return prediction

    def branches(self, x: Array, run: PreparedRun, index: int = 0) -> tuple[Array, Array]:
        """Return the predictions of the strong and the weak branch at x as NumPy arrays.

        Each branch runs by a separate graph. `guide(strong, weak, run.scales[index])` combines
        the predictions. Raises UsageError if the strong branch runs alone.
        """
        with self._evaluating(x, run, index) as (leased, runner, held):
            strong, weak = (leased.lane.memory.download(part) for part in runner.branches(held, run, index))
            return strong, weak

    def decode(self, x: Array) -> NDArray[np.uint8]:
        """Return the images of samples (B, C, H, W) float32, (B, H, W, C) uint8.

        Values of a pixel model in [-1, 1] become those in 0 to 255. Latents run through the
        decoder, one at a time. Raises UsageError for latents if the bundle has no decoder, and
        NonFiniteError if an image is not finite.
        """
        if not self.gives_images:
            raise UsageError(
                f"{self.bundle.path}: expected a decoder for the model's latents, found none: pass decode=, use the "
                f"latents, or build the bundle with `vae` FOLDER"
            )
        shape = self.bundle.manifest.model.latent
        expect("x", x, np.ndarray, f"an array of floats of shape (B, {', '.join(map(str, shape))})")
        if x.ndim != 4 or x.shape[1:] != shape or x.dtype.kind != "f":
            raise UsageError(
                f"x: expected floats of shape (B, {', '.join(map(str, shape))}), found {x.dtype} of shape {x.shape}"
            )
        if self.bundle.manifest.decode_graph is not None:
            (x,) = self.run_part("decode", {"latents": x.astype(np.float32)})
            check_finite(x, self.bundle, self._opened.name)
        return to_pixels(x)

    def run_part(self, part: Part, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the outputs of a part's graph, "text" or "decode", for inputs with P rows.

        It runs one row at a time. Raises UsageError if the bundle lacks the part.
        """
        graph = self.bundle.manifest.part_graph(part)
        if graph is None:
            raise UsageError(f"part {part!r}: expected one of {', '.join(self.bundle.manifest.parts) or 'none'}")
        return self._opened.run(part, graph, feeds)

    @property
    def gives_images(self) -> bool:
        """Whether runs give images: of a pixel model, or by the decoder of the bundle."""
        manifest = self.bundle.manifest
        return manifest.model.space == "pixel" or manifest.decode_graph is not None

    def _scaled(self, guidance: GuidancePlan | None, scale: Ramp | None) -> GuidancePlan:
        expect("guidance", guidance, GuidancePlan, "a GuidancePlan, which `Pipeline.guidance(…)` returns")
        manifest = self.bundle.manifest
        plan = manifest.guidance if guidance is None else guidance
        if manifest.sizes and plan.strong not in levels(manifest):
            for other in manifest.views[1:]:
                if plan.strong in levels(other):
                    raise UsageError(
                        f"guidance: expected a plan for {size_text(manifest.model.size)}, found one for "
                        f"{size_text(other.model.size)}: make it by this pipeline"
                    )
        return plan if scale is None else with_scale(plan, scale)

    @contextmanager
    def _running(self) -> Iterator[tuple[LaneState, GraphRunner]]:
        """Lease a lane for this thread. Yields the lane and a graph runner in it."""
        backend, lanes = self._opened.step(self.bundle)
        with lanes.lease() as leased:
            yield leased, GraphRunner(self.bundle.manifest, leased.lane, self.batch, backend.batches)
            backend.keep()

    @contextmanager
    def _evaluating(
        self, x: Array, run: PreparedRun, index: int
    ) -> Iterator[tuple[LaneState, GraphRunner, DeviceArray]]:
        """Lease a lane for this thread and put x on its device.

        Raises UsageError if x or `index` does not fit the run.
        """
        if not isinstance(run, PreparedRun):
            raise UsageError(f"run: expected a PreparedRun, as prepare() and prepare_once() return, found {run!r}")
        if not 0 <= whole_number("evaluation", index) < len(run.times):
            raise UsageError(f"evaluation {index}: expected 0 to {len(run.times) - 1} in the prepared run")
        with self._running() as (leased, runner):
            held = leased.lane.memory.hold(x)
            expected = (run.images, *self.bundle.manifest.model.latent)
            if held.dtype != np.float32 or held.shape != expected:
                raise UsageError(f"x: expected float32 of shape {expected}, found {held.dtype} of shape {held.shape}")
            yield leased, runner, held

    def _prepare(
        self,
        places: Sequence[Update],
        classes: Classes | Conditions,
        seeds: Sequence[int],
        guidance: GuidancePlan,
        last_step: int | None = None,
    ) -> PreparedRun:
        manifest = self.bundle.manifest
        conditions = parse(manifest.model, classes)
        batch = Batch(conditions, checked_seeds(seeds, len(conditions)))
        check_times(manifest.model, [update.time for update in places])
        with self._running() as (leased, runner):
            run = prepare(manifest, runner.hoist, guidance, places, batch, last_step)
            leased.lane.memory.wait()  # another lane may use the prepared run
            return run


def _load_again(path: Path, manifest: Manifest, size: tuple[int, int], arguments: dict[str, Any]) -> Pipeline:
    """Load the bundle of a pickled pipeline. Raises BundleError if its manifest has changed."""
    opened = Bundle.open(path, verify_hashes=arguments["verify_hashes"])
    for own in opened.views:  # a view may have been loaded
        if own.manifest == manifest:
            return Pipeline.load(own, **arguments).at(*size)
    raise BundleError(f"{path}: expected the bundle that was pickled, found another one: load the bundle again")
