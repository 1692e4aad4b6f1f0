"""From a bundle to images: conditioning for a whole run first, then one guided prediction per evaluation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from sg_runtime import random
from sg_runtime.backends import Backend, open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.guidance import choose, guide
from sg_runtime.images import to_pixels
from sg_runtime.manifest import GraphFacts, GuidanceMode, GuidancePlan, Level, SamplerName
from sg_runtime.requests import check_seeds, class_index, given_subset, whole_number
from sg_runtime.sampling import SAMPLERS, evaluations, flow_times

Array = NDArray[np.float32]
Indices = NDArray[np.int64]
Classes = Sequence[int | str | None]
Progress = Callable[[int, int], None]
"""(evaluations done, evaluations in all) of a run."""

DEFAULT_BATCH = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """All that E evaluations of B images need beside the latent.

    modulations: (E, U, M) float32, a row per evaluation and distinct class. strong_rows, weak_rows: (B,) int64, each
    image's row among the U. keep_strong, keep_weak: (E, B, K) int64 sorted, None where the branch keeps all tokens.
    """

    guidance: GuidancePlan
    modulations: Array
    strong_rows: Indices
    weak_rows: Indices
    keep_strong: Indices | None
    keep_weak: Indices | None


class Pipeline:
    """A bundle ready to run. Safe to use from several threads."""

    def __init__(self, bundle: Bundle, backend: Backend, batch: int) -> None:
        self.bundle = bundle
        self.backend = backend
        self.batch = batch

    @classmethod
    def load(
        cls, bundle: str | Path, device: str = "auto", *, batch: int | None = None, verify_hashes: bool = True
    ) -> "Pipeline":
        """Open the bundle at `bundle` for `device` ("auto" or "cpu").

        batch: the most images in one engine run, for graphs with a symbolic batch (default 16). verify_hashes: see
        `Bundle.open`. Raises BundleError for a damaged bundle, MissingExtraError without a backend library.
        """
        opened = Bundle.open(bundle, verify_hashes=verify_hashes)
        if opened.manifest.model.prediction != "flow":
            raise UsageError(
                f"{bundle}: {opened.manifest.model.prediction} prediction cannot be sampled by this version"
            )
        if batch is not None and batch < 1:
            raise UsageError(f"batch: expected at least 1, found {batch}")
        fixed = opened.manifest.batch
        if fixed is not None and batch not in (None, fixed):
            raise UsageError(f"batch: the graphs of {bundle} are fixed to {fixed} images, found {batch}")
        return cls(opened, open_backend(opened, device), fixed or batch or DEFAULT_BATCH)

    def guidance(
        self,
        mode: GuidanceMode | None = None,
        *,
        strong_sparsity: float | None = None,
        sparsity: float | None = None,
        scale: float | None = None,
    ) -> GuidancePlan:
        """The bundle's guidance plan with the given parts replaced; `sparsity` is the weak branch's.

        Raises UsageError for what this bundle was not built for, naming the build that would serve.
        """
        return choose(self.bundle.manifest, mode=mode, strong_sparsity=strong_sparsity, sparsity=sparsity, scale=scale)

    def __call__(
        self,
        classes: Classes,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        scale: float | None = None,
        sampler: SamplerName | None = None,
        guidance: GuidancePlan | None = None,
        decode: Callable[[Array], NDArray[Any]] | None = None,
        progress: Progress | None = None,
    ) -> NDArray[Any]:
        """One image per class and seed; see `sample` for the arguments.

        Returns (B, H, W, C) uint8 for pixel models, `decode(latents)` where it is given, else latents (B, C, H, W).
        """
        x = self.sample(classes, seeds, steps=steps, scale=scale, sampler=sampler, guidance=guidance, progress=progress)
        if decode is not None:
            return decode(x)
        return self.decode(x) if self.bundle.manifest.model.space == "pixel" else x

    def sample(
        self,
        classes: Classes,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        scale: float | None = None,
        sampler: SamplerName | None = None,
        guidance: GuidancePlan | None = None,
        fused: bool = True,
        progress: Progress | None = None,
    ) -> Array:
        """Sample one image per class and seed, (B, C, H, W) float32.

        classes: index, name, or None for no class. seeds: 0 to 2**64 - 1; an image depends on its class and seed, not
        on the others: bit for bit where the graphs run at one batch size, to rounding otherwise. guidance: from
        `self.guidance(…)`, by default the bundle's; scale replaces its scale. fused: use the guided graph where there
        is one; False combines the single-branch graphs' outputs here. progress: called after every evaluation.
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
        times = flow_times(steps)
        calls = evaluations(sampler, steps)
        groups = list(self._groups(len(labels)))
        finished = count(1)

        def sample_group(group: Indices) -> Array:
            own_seeds = [seeds[image] for image in group]
            plan = self._prepare(chosen, times[[sum(call) for call in calls]], labels[group], own_seeds, calls)

            def velocity(x: Array, step: int, evaluation: int) -> Array:
                prediction = self._guided(x, plan, calls.index((step, evaluation)), fused)
                if progress is not None:
                    progress(next(finished), len(calls) * len(groups))
                return prediction

            return SAMPLERS[sampler](velocity, self.initial_noise(own_seeds), times)

        return np.concatenate([sample_group(group) for group in groups])[: len(labels)]

    def initial_noise(self, seeds: Sequence[int]) -> Array:
        """The state that sampling starts from, (B, C, H, W) float32 standard normal; row k is that of seeds[k]."""
        model = self.bundle.manifest.model
        shape = (model.channels, model.image_size, model.image_size)
        return np.stack([random.normal(seed, random.INITIAL_NOISE, shape) for seed in seeds])

    def prepare(
        self,
        times: Sequence[float] | Array,
        classes: Classes,
        seeds: Sequence[int],
        *,
        counters: Sequence[tuple[int, int]] | None = None,
        guidance: GuidancePlan | None = None,
        scale: float | None = None,
    ) -> Plan:
        """Compute conditioning and token subsets of evaluations at `times`, for `guided(x, plan, i)`.

        counters: (step, evaluation) of each evaluation, for its random subsets; by default (i, 0).
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
        return self._prepare(self._scaled(guidance, scale), np.asarray(times, np.float32), labels, seeds, counters)

    @overload
    def guided(self, x: Array, plan: Plan, index: int, /) -> Array: ...

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
        scale: float | None = None,
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
        scale: float | None = None,
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
        scale: float | None = None,
        guidance: GuidancePlan | None = None,
        keep_strong: Indices | None = None,
        keep_weak: Indices | None = None,
        return_branches: bool = False,
    ) -> Array | tuple[Array, Array, Array]:
        """The guided prediction (velocity) at x (B, C, H, W) float32, for samplers of one's own.

        `guided(x, plan, i)` is evaluation i of a plan from `prepare`. `guided(x, t, classes, …)` prepares for this one
        call: seeds (default 0 to B - 1) and step draw the token subsets, unless keep_strong and keep_weak, (B, K)
        int64 sorted, give them. return_branches: return (guided, strong, weak).
        """
        if isinstance(plan_or_t, Plan):
            plan, index = plan_or_t, whole_number("evaluation", index_or_classes)
            if step or any(value is not None for value in (seeds, scale, guidance, keep_strong, keep_weak)):
                raise UsageError("a plan settles seeds, step, scale, guidance and subsets: give these to prepare")
            if not 0 <= index < len(plan.modulations):
                raise UsageError(f"evaluation {index}: the plan has 0 to {len(plan.modulations) - 1}")
        else:
            classes: Classes = index_or_classes  # type: ignore[assignment]
            drawn = self.prepare(
                [plan_or_t],
                classes,
                range(len(classes)) if seeds is None else seeds,
                counters=[(step, 0)],
                guidance=guidance,
                scale=scale,
            )
            tokens, index = self.bundle.manifest.model.tokens, 0
            plan = replace(
                drawn,
                keep_strong=given_subset("keep_strong", keep_strong, drawn.keep_strong, tokens),
                keep_weak=given_subset("keep_weak", keep_weak, drawn.keep_weak, tokens),
            )
        self._check_latent(x, len(plan.strong_rows))
        if return_branches:
            strong, weak = self._branches(x, plan, index)
            return guide(strong, weak, plan.guidance.scale), strong, weak
        return self._guided(x, plan, index, fused=True)

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

    def _scaled(self, guidance: GuidancePlan | None, scale: float | None) -> GuidancePlan:
        plan = self.bundle.manifest.guidance if guidance is None else guidance
        return plan if scale is None else replace(plan, scale=float(scale))

    def _labels(self, classes: Classes) -> Indices:
        """Class indices, (B,) int64."""
        if len(classes) == 0:
            raise UsageError("classes: expected at least one, found none")
        return np.array([class_index(self.bundle.manifest.model, name) for name in classes], dtype=np.int64)

    def _groups(self, images: int) -> Iterator[Indices]:
        """Image indices of each engine run, all of one length; the last image fills up the last group."""
        rows = self.bundle.manifest.batch or min(self.batch, images)
        for start in range(0, images, rows):
            yield np.minimum(np.arange(start, start + rows), images - 1)

    def _prepare(
        self,
        guidance: GuidancePlan,
        times: Array,
        labels: Indices,
        seeds: Sequence[int],
        counters: Sequence[tuple[int, int]],
    ) -> Plan:
        model = self.bundle.manifest.model
        wanted = np.append(labels, model.num_classes) if guidance.mode == "cfg" else labels
        distinct, rows = np.unique(wanted, return_inverse=True)
        strong_rows = rows[: len(labels)]
        weak_rows = np.full_like(strong_rows, rows[-1]) if guidance.mode == "cfg" else strong_rows
        modulations = self._condition(np.repeat(times, len(distinct)), np.tile(distinct, len(times)))

        def subsets(level: Level, branch: int) -> Indices | None:
            if level.keep == model.tokens:
                return None
            drawn = [
                random.subset(seed, model.tokens, level.keep, step=step, evaluation=evaluation, branch=branch)
                for step, evaluation in counters
                for seed in seeds
            ]
            return np.stack(drawn).reshape(len(counters), len(seeds), level.keep)

        return Plan(
            guidance,
            modulations.reshape(len(times), len(distinct), -1),
            strong_rows,
            weak_rows,
            subsets(guidance.strong, random.STRONG),
            subsets(guidance.weak, random.WEAK) if guidance.mode != "none" else None,
        )

    def _condition(self, t: Array, classes: Indices) -> Array:
        """Rows of modulations (S, M) for t (S,) and classes (S,), by runs of one fixed row count."""
        rows = self.bundle.manifest.condition_rows
        parts = []
        for start in range(0, len(t), rows):
            row = np.minimum(np.arange(start, start + rows), len(t) - 1)
            parts.append(self.backend.run(self.bundle.manifest.condition, {"t": t[row], "class": classes[row]}))
        return np.concatenate(parts)[: len(t)]

    def _guided(self, x: Array, plan: Plan, index: int, fused: bool) -> Array:
        """The guided prediction for all images, by the guided graph where there is one and `fused` asks for it."""
        guidance = plan.guidance
        if guidance.mode == "none":
            return self._branch(
                x, guidance.strong, plan.modulations[index][plan.strong_rows], _at(plan.keep_strong, index)
            )
        graph = self.bundle.manifest.graph("guided", guidance.strong.keep, guidance.weak.keep)
        if guidance.mode != "sg" or not fused or graph is None:
            return guide(*self._branches(x, plan, index), guidance.scale)
        images = {
            "x": x,
            "modulations": plan.modulations[index][plan.strong_rows],
            "keep_strong": _at(plan.keep_strong, index),
            "keep_weak": _at(plan.keep_weak, index),
        }
        return self._run(graph, images, {"scale": np.array(guidance.scale, dtype=np.float32)})

    def _branches(self, x: Array, plan: Plan, index: int) -> tuple[Array, Array]:
        """The predictions of the strong and the weak branch, each by its own graph."""
        if plan.guidance.mode == "none":
            raise UsageError("return_branches: expected guidance with two branches, found mode none")
        rows = plan.modulations[index]
        strong = self._branch(x, plan.guidance.strong, rows[plan.strong_rows], _at(plan.keep_strong, index))
        weak = self._branch(x, plan.guidance.weak, rows[plan.weak_rows], _at(plan.keep_weak, index))
        return strong, weak

    def _branch(self, x: Array, level: Level, modulations: Array, keep: Indices | None) -> Array:
        manifest = self.bundle.manifest
        graph = manifest.graph("dense" if keep is None else "sparse", level.keep)
        if graph is None:
            raise UsageError(
                f"sparsity {level.sparsity:g} has no graph of its own in this bundle; "
                f"build it with: sg-export build {manifest.source.name} --sparsity {level.sparsity:g}"
            )
        return self._run(graph, {"x": x, "modulations": modulations, "keep": keep}, {})

    def _run(self, graph: GraphFacts, images: dict[str, NDArray[Any] | None], shared: dict[str, Array]) -> Array:
        """Run `graph` on all images, in groups. `images`: arrays with a leading B, None for an input it has not."""
        given = {name: value for name, value in images.items() if value is not None}
        total = len(given["x"])
        parts = [
            self.backend.run(graph, {name: value[group] for name, value in given.items()} | shared)
            for group in self._groups(total)
        ]
        return np.concatenate(parts)[:total]

    def _check_latent(self, x: Array, images: int) -> None:
        model = self.bundle.manifest.model
        expected = (images, model.channels, model.image_size, model.image_size)
        if x.dtype != np.float32 or x.shape != expected:
            raise UsageError(f"x: expected float32 of shape {expected}, found {x.dtype} of shape {x.shape}")


def _at(keep: Indices | None, index: int) -> Indices | None:
    return None if keep is None else keep[index]
