"""From a bundle to images: conditioning for a whole run first, then one guided prediction per evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from sg_runtime import random
from sg_runtime.backends import Backend, open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.guidance import Ramp, choose, guide, with_scale
from sg_runtime.images import to_pixels
from sg_runtime.manifest import GuidanceMode, GuidancePlan, SamplerName
from sg_runtime.plan import Plan, prepare
from sg_runtime.requests import check_seeds, check_times, class_index, given_subset, whole_number
from sg_runtime.sampling import SAMPLERS, Churn, integrate, run_times, updates
from sg_runtime.steps import StepRunner, Tail

Array = NDArray[np.float32]
Indices = NDArray[np.int64]
Classes = Sequence[int | str | None]
Progress = Callable[[int, int], None]
"""(evaluations done, evaluations in all) of a run."""

DEFAULT_BATCH = 16


class Pipeline:
    """A bundle ready to run. Safe to use from several threads."""

    def __init__(self, bundle: Bundle, backend: Backend, batch: int) -> None:
        self.bundle = bundle
        self.backend = backend
        self.batch = batch
        self._steps = StepRunner(bundle.manifest, backend, batch)

    @classmethod
    def load(
        cls, bundle: str | Path, device: str = "auto", *, batch: int | None = None, verify_hashes: bool = True
    ) -> "Pipeline":
        """Open the bundle at `bundle` for `device` ("auto" or "cpu").

        batch: the most images in one engine run, for graphs with a symbolic batch (default 16). verify_hashes: see
        `Bundle.open`. Raises BundleError for a damaged bundle, MissingExtraError without a backend library.
        """
        opened = Bundle.open(bundle, verify_hashes=verify_hashes)
        if batch is not None and batch < 1:
            raise UsageError(f"batch: expected at least 1, found {batch}")
        fixed = opened.manifest.batch
        if fixed is not None and batch not in (None, fixed):
            raise UsageError(f"batch: the graphs of {bundle} are fixed to {fixed} images, found {batch}")
        return cls(opened, open_backend(opened, device, batch), fixed or batch or DEFAULT_BATCH)

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

        classes: index, name, or None for no class. seeds: 0 to 2**64 - 1; an image depends on its class and seed, not
        on the others: bit for bit where the graphs run at one batch size, to rounding otherwise. guidance: from
        `self.guidance(…)`, by default the bundle's; scale replaces its scale. churn: noise that an edm run adds. fused:
        use the guided graph where there is one; False always runs the two branches by graphs of their own. progress:
        called after every evaluation.
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
        run = updates(sampler, model.prediction, times, churn)
        groups = list(self._steps.groups(len(labels)))
        finished = count(1)

        def sample_group(group: Indices) -> Array:
            own = [seeds[image] for image in group]
            counters = [(update.step, update.evaluation) for update in run]
            plan = self._prepare(chosen, [update.time for update in run], labels[group], own, counters, steps - 1)

            def advance(index: int, x: Array, r: Array) -> Array:
                update = run[index]
                following = self._steps.advance(x, plan, index, Tail(update.a, update.b, update.e, r), fused)
                if progress is not None:
                    progress(next(finished), len(run) * len(groups))
                return following

            start = np.float32(times[0]) * self.initial_noise(own)
            return integrate(run, advance, start, lambda step: self._noise(own, random.CHURN, step))

        return np.concatenate([sample_group(group) for group in groups])[: len(labels)]

    def initial_noise(self, seeds: Sequence[int]) -> Array:
        """Standard normal noise, (B, C, H, W) float32; row k is that of seeds[k].

        A flow run starts from it, an edm run from its product with the highest sigma.
        """
        return self._noise(seeds, random.INITIAL_NOISE, 0)

    def prepare(
        self,
        times: Sequence[float] | Array,
        classes: Classes,
        seeds: Sequence[int],
        *,
        counters: Sequence[tuple[int, int]] | None = None,
        guidance: GuidancePlan | None = None,
        scale: Ramp | None = None,
    ) -> Plan:
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
        return self._prepare(
            chosen, [float(time) for time in times], labels, seeds, counters, max(step for step, _ in counters)
        )

    @overload
    def guided(self, x: Array, plan: Plan, index: int, /, *, return_branches: Literal[False] = False) -> Array: ...

    @overload
    def guided(
        self, x: Array, plan: Plan, index: int, /, *, return_branches: Literal[True]
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
        plan_or_t: Plan | float,
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
        keep_strong and keep_weak, (B, K) int64 sorted, give them. return_branches: return (guided, strong, weak).
        """
        if isinstance(plan_or_t, Plan):
            plan, index = plan_or_t, whole_number("evaluation", index_or_classes)
            if step or any(value is not None for value in (seeds, scale, guidance, keep_strong, keep_weak)):
                raise UsageError("a plan settles seeds, step, scale, guidance and subsets: give these to prepare")
            if not 0 <= index < len(plan.times):
                raise UsageError(f"evaluation {index}: the plan has 0 to {len(plan.times) - 1}")
        else:
            classes: Classes = index_or_classes  # type: ignore[assignment]
            plan, index = self._one_off(plan_or_t, classes, seeds, step, self._scaled(guidance, scale)), 0
            plan = self._with_subsets(plan, keep_strong, keep_weak)
        self._check_latent(x, len(plan.strong.rows))
        if return_branches:
            strong, weak = self._steps.branches(x, plan, index)
            return guide(strong, weak, plan.scales[index]), strong, weak
        return self._steps.prediction(x, plan, index)

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

    def _noise(self, seeds: Sequence[int], purpose: int, step: int) -> Array:
        model = self.bundle.manifest.model
        shape = (model.channels, model.image_size, model.image_size)
        return np.stack([random.normal(seed, purpose, shape, step=step) for seed in seeds])

    def _prepare(
        self,
        guidance: GuidancePlan,
        times: Sequence[float],
        labels: Indices,
        seeds: Sequence[int],
        counters: Sequence[tuple[int, int]],
        last_step: int,
    ) -> Plan:
        manifest = self.bundle.manifest
        check_times(manifest.model, times)
        return prepare(manifest, self._steps.condition, guidance, times, labels, seeds, counters, last_step)

    def _one_off(
        self, t: float, classes: Classes, seeds: Sequence[int] | None, step: int, guidance: GuidancePlan
    ) -> Plan:
        """The plan of one evaluation; what changes over a run is as in the bundle's default number of steps."""
        labels = self._labels(classes)
        seeds = range(len(labels)) if seeds is None else seeds
        check_seeds(seeds, len(labels))
        if whole_number("step", step) < 0:
            raise UsageError(f"step: expected at least 0, found {step}")
        last_step = max(step, self.bundle.manifest.sampling.steps - 1)
        return self._prepare(guidance, [float(t)], labels, seeds, [(step, 0)], last_step)

    def _with_subsets(self, plan: Plan, strong: Indices | None, weak: Indices | None) -> Plan:
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

    def _check_latent(self, x: Array, images: int) -> None:
        model = self.bundle.manifest.model
        expected = (images, model.channels, model.image_size, model.image_size)
        if x.dtype != np.float32 or x.shape != expected:
            raise UsageError(f"x: expected float32 of shape {expected}, found {x.dtype} of shape {x.shape}")
