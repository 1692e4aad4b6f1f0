"""Comparison of a quantized bundle with its checkpoint in PyTorch, at every time of guided runs.

The gates are those of the bundle's build.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_calibration.feeds import images_of
from sg_calibration.prompts import Encode, Prompts
from sg_calibration.settings import LEAST_STRATA
from sg_export.loading import LoadedModel
from sg_export.options.quantize import GATE_IMAGES
from sg_export.parity.compare import Comparison, Feed, compare_arrays, rates_of
from sg_export.parity.torch_branches import by_pytorch
from sg_export.parity.walk import Walk, by_pipeline, sampled, walk
from sg_runtime.backends import Lane
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.guidance import guide
from sg_runtime.manifest import GuidancePlan
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.launches import launches

EVERY = 3
"""Interval of the evaluations of a run whose inputs are saved for Polygraphy."""


def compare_guidance(
    pipeline: Pipeline,
    loaded: LoadedModel,
    weak: LoadedModel | None,
    guidance: GuidancePlan,
    encode: Encode | None = None,
) -> tuple[Walk, list[Comparison]]:
    """Compare the bundle's predictions with PyTorch's at every time of a guided run of PyTorch.

    The gates of the bundle's build apply. Then compares complete runs, without a gate. The subject
    also gives the distance between two PyTorch runs with different kept tokens. encode: see
    `reference_walk`.
    """
    manifest = pipeline.bundle.manifest
    assert manifest.quantization is not None
    gates = manifest.quantization.gates
    own = reference_walk(pipeline, loaded, weak, guidance, encode)
    conditions, seeds = own.conditions, own.seeds
    plan, branches = pipeline.prepare(own.times, conditions, seeds, guidance=guidance), by_pipeline(pipeline)
    comparisons = []
    name = f"{guidance.mode} {rates_of(guidance)}"
    for index, time in enumerate(own.times):
        wanted = own.strong[index], own.weak[index]
        found = branches(own.states[index], plan, index)
        for branch, w, f in zip(("strong", "weak"), wanted, found, strict=True):
            comparisons.append(compare_arrays(name, f"{branch} branch", time, w, f, None, gates.cosine))
        both = guide(*wanted, guidance.scale), guide(*found, guidance.scale)
        comparisons.append(compare_arrays(name, "guided", time, *both, gates.guided, None))
    samples = sampled(pipeline, conditions, seeds, steps=len(own.times), sampler="euler", guidance=guidance)
    subject = f"{len(own.times)} euler steps, {name}; other kept tokens: {own.mask_noise:.2%}"
    comparisons.append(compare_arrays(subject, "samples", None, own.samples, samples, None, None))
    return own, comparisons


def reference_walk(
    pipeline: Pipeline,
    loaded: LoadedModel,
    weak: LoadedModel | None,
    guidance: GuidancePlan,
    encode: Encode | None = None,
    *,
    noise: bool = True,
) -> Walk:
    """Return the guided run of PyTorch that a quantized bundle is compared with; see `walk`.

    encode: text encoder for the prompts that the gates judged; None if they judged none.
    """
    manifest = pipeline.bundle.manifest
    conditions, seeds = images_of("gate", manifest.model, GATE_IMAGES)
    if encode is not None and manifest.quantization is not None and manifest.quantization.prompts:
        conditions = Prompts(manifest.quantization.prompts, encode).conditions(GATE_IMAGES)
    return walk(pipeline, by_pytorch(loaded, weak, conditions), guidance, conditions, seeds, LEAST_STRATA, noise=noise)


def feeds_of(pipeline: Pipeline, lane: Lane, own: Walk) -> dict[str, list[Feed]]:
    """Return the inputs of the graphs along a run, by the graph's name.

    Each feed holds the images of the first engine run of its evaluation.
    """
    manifest = pipeline.bundle.manifest
    runner = GraphRunner(manifest, lane, pipeline.batch, pipeline.backend.batches)
    plan = pipeline.prepare(own.times, own.conditions, own.seeds, guidance=own.guidance)
    feeds: dict[str, list[Feed]] = {}
    for index in range(0, len(own.times), EVERY):
        x = own.states[index]
        group = next(runner.groups(len(x)))
        for launch in launches(manifest, plan, index, 0.0, 1.0, 0.0):
            given = runner.feeds(plan, launch, x, x, group)
            feeds.setdefault(launch.graph.name, []).append({name: _on_cpu(v, lane) for name, v in given.items()})
    return feeds


def _on_cpu(value: DeviceArray, lane: Lane) -> NDArray[Any]:
    return np.asarray(value) if isinstance(value, np.ndarray | np.generic) else lane.memory.download(value)
