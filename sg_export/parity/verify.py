"""Parity of a bundle with its checkpoint in PyTorch.

Polygraphy runs and compares every graph at several times. Complete sampling runs are compared too.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, RunResults
from polygraphy.logger import G_LOGGER

from sg_calibration.prompts import Encode
from sg_export.graph.check import check_reference
from sg_export.graph.emulate import emulated
from sg_export.graph.module import columns_in_torch, random_inputs
from sg_export.graph.overflow import first_overflow
from sg_export.loading import LoadedModel, reload_checkpoint, reload_weak
from sg_export.options.types import BASES
from sg_export.parity import two_pass
from sg_export.parity.compare import RUN_IMAGES, Comparison, Feed, Parity, compare_arrays, rates_of
from sg_export.parity.parts import compare_parts, reload_part
from sg_export.parity.polygraphy import LaneRunner, TorchRunner, engine_command, onnx_commands, save_data
from sg_export.parity.strata import compare_guidance, feeds_of, reference_walk
from sg_export.parity.torch_backend import TorchBackend, to_storage
from sg_export.parity.walk import sampled
from sg_export.parts.decode import LoadedDecoder
from sg_export.parts.encode import encode
from sg_export.parts.text import LoadedText
from sg_export.progress import Report, silent
from sg_runtime.backends import Lane
from sg_runtime.backends.ort import OrtBackend, open_session
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Conditions, examples, of_classes
from sg_runtime.errors import BundleError
from sg_runtime.guidance import built_guidances, levels
from sg_runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    EngineFacts,
    GraphFacts,
    GuidancePlan,
    Labels,
    Manifest,
    ModelFacts,
    Part,
    Precision,
    SamplerName,
    Shifted,
    schema_of,
    size_text,
)
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import SAMPLERS, precondition, updates

TIMES = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.98)
"""Default times of the graph comparisons."""
RUN_STEPS = 10
"""Number of steps of a compared sampling run."""


def verify(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    *,
    weak_checkpoint: str | Path | None = None,
    pipeline: Path | None = None,
    vae: Path | None = None,
    device: str | None = None,
    backend: str | None = None,
    times: Sequence[float] = TIMES,
    save_polygraphy: Path | None = None,
    report: Report = silent,
) -> Parity:
    """Compare a bundle with its checkpoint, reloaded through the adapter, at all of its sizes.

    checkpoint, weak_checkpoint: checkpoints of the networks. By default the reference model, or the
    file of the recorded name, next to the bundle or in the current folder.
    pipeline, vae: folders of text encoder and decoder; see `reload_part`.
    device, backend: device and backend that run the bundle, see `Pipeline.load`. Without both, the
    graphs run on the CPU; half-precision graphs then run in FP32 with the rounding of their type.
    times: times in (0, 1]. An edm model is compared at the noise levels at the same fractions of
    its run. A quantized bundle is compared at all times of a guided run instead.
    save_polygraphy: folder for inputs and PyTorch's outputs in Polygraphy's format, of ONNX files
    and of engines. If the bundle holds engines alone, and neither device nor backend is given, the
    data is saved and nothing is compared.

    Raises CheckpointError if the checkpoint is missing, is not the one that the bundle was built
    from, or gives values in PyTorch that are not finite. Raises BundleError if the bundle is
    damaged.
    """
    opened = Bundle.open(bundle)
    if schema_of(opened.path / MANIFEST_FILE) != SCHEMA_VERSION:
        raise BundleError(
            f"{opened.path}: expected a bundle of this version, found one of an earlier version: it runs, but its "
            f"graphs read other inputs than this version compares; rebuild it: "
            f"{build_command(opened.manifest, str(opened.path))}"
        )
    if save_polygraphy is not None:
        save_polygraphy.mkdir(parents=True, exist_ok=True)
    G_LOGGER.module_severity = {"": G_LOGGER.ERROR}
    found = Parity((), ())
    parts = {part: reload_part(opened, part, checkpoint, pipeline, vae) for part in opened.manifest.parts}
    for view in opened.views:
        report_of_view = _naming(view, report)
        parity = _verify(
            view, parts, checkpoint, weak_checkpoint, device, backend, times, save_polygraphy, report_of_view
        )
        found = _joined(found, _named(view, parity))
    return found


def _size_prefix(view: Bundle) -> str:
    """Return the size of a bundle and a colon if the bundle has several sizes."""
    return f"{size_text(view.manifest.model.size)}: " if view.manifest.sizes else ""


def _naming(view: Bundle, report: Report) -> Report:
    """Return a report whose stages name the size."""

    def named(stage: str, done: int, total: int | None, share: float | None = None) -> None:
        report(f"{_size_prefix(view)}{stage}", done, total, share)

    return named


def _named(view: Bundle, parity: Parity) -> Parity:
    """Return the comparisons with the size in their subjects. Graphs have it in their names."""
    graphs, prefix = {graph.name for graph in view.manifest.graphs_of_parts}, _size_prefix(view)
    named = (c if c.subject in graphs else replace(c, subject=f"{prefix}{c.subject}") for c in parity.comparisons)
    return replace(parity, comparisons=tuple(named))


def _joined(first: Parity, second: Parity) -> Parity:
    """Return both, without the graphs of `second` that `first` has: they serve all sizes."""
    known = {comparison.subject for comparison in first.comparisons}
    return Parity(
        (*first.comparisons, *(c for c in second.comparisons if c.subject not in known)),
        tuple(dict.fromkeys((*first.commands, *second.commands))),
    )


def _verify(
    opened: Bundle,
    parts: Mapping[Part, LoadedText | LoadedDecoder],
    checkpoint: str | Path | None,
    weak_checkpoint: str | Path | None,
    device: str | None,
    backend: str | None,
    times: Sequence[float],
    save_polygraphy: Path | None,
    report: Report,
) -> Parity:
    """Compare a bundle at one size; arguments and errors as in `verify`.

    parts: networks of text encoder and decoder.
    """
    if device is None and backend is None:
        graphs = opened.manifest.hoisted("main")[0].file is not None
        if not graphs and save_polygraphy is None:
            raise BundleError(
                f"{opened.path}: expected ONNX graphs, found only engines; rebuild it with `keep_onnx`, or give "
                f"`save_polygraphy` here, or `device` cuda on the machine with their GPU"
            )
        pipeline, lane = _emulated(opened) if graphs else None, None
    else:
        pipeline = Pipeline.load(opened, device or "auto", backend=backend)
        lane = pipeline.backend.lane()
        lane.enter()
    loaded = reload_checkpoint(opened, checkpoint)
    networks = _Networks(loaded, reload_weak(opened, weak_checkpoint, loaded), _encode(opened, parts))
    parity = Parity((), ())
    if pipeline is not None:
        sides = _Sides(pipeline, networks)
        if opened.manifest.quantization is not None:
            parity = _compare_quantized(sides, lane or pipeline.backend.lane(), times, save_polygraphy, report)
        else:
            parity = _compare(sides, lane, times, save_polygraphy, report)
    if parts and (pipeline is not None or save_polygraphy is not None):
        own = compare_parts(opened, parts, None if lane is None else pipeline, save_polygraphy, report)
        parity = Parity((*parity.comparisons, *own.comparisons), (*parity.commands, *own.commands))
    if save_polygraphy is None:
        return parity
    engines = _save_engines(opened, networks, times, save_polygraphy, report)
    return replace(parity, commands=(*parity.commands, *engines))


def _encode(bundle: Bundle, parts: Mapping[Part, LoadedText | LoadedDecoder]) -> Encode | None:
    """Return the text encoder among the networks of the parts."""
    text, conditions = parts.get("text"), bundle.manifest.model.conditions
    if not isinstance(text, LoadedText) or isinstance(conditions, Labels):
        return None
    return functools.partial(encode, text, tokens=conditions.tokens)


@dataclass(frozen=True, slots=True)
class _Networks:
    """The networks of a bundle in PyTorch.

    main: the main network.
    weak: the weak network, if the bundle has one.
    encode: the text encoder, if the bundle has one.
    """

    main: LoadedModel
    weak: LoadedModel | None
    encode: Encode | None

    def of(self, graph: GraphFacts) -> LoadedModel:
        """Return the network that `graph` was traced from."""
        found = self.main if graph.network == "main" else self.weak
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both sides of a comparison: the bundle's pipeline, and its networks in PyTorch."""

    pipeline: Pipeline
    networks: _Networks


def _compare(sides: _Sides, lane: Lane | None, times: Sequence[float], folder: Path | None, report: Report) -> Parity:
    """Compare every graph at these times, then complete runs."""
    pipeline, bundle = sides.pipeline, sides.pipeline.bundle
    manifest = bundle.manifest
    singles = any(graph.kind in ("dense", "sparse") for graph in manifest.graphs)
    runs = [
        (guidance, sampler, fused)
        for guidance in _guidances(manifest)
        for sampler in SAMPLERS
        for fused in ((True, False) if guidance.row.fusible else (False,))
        if fused or singles
    ]
    stages = len(manifest.graphs) + len(runs)
    rows = RUN_IMAGES if pipeline.backend.batches is None else pipeline.backend.batches[0]
    comparisons: list[Comparison] = []
    commands: list[str] = []
    for number, graph in enumerate(manifest.graphs):
        report(f"comparing {graph.name}", number, stages)
        network = sides.networks.of(graph)
        feeds = [_feed(manifest, network, graph, t, k, rows) for k, t in enumerate(times)]
        if lane is None:
            runner = OnnxrtRunner(functools.partial(_open, bundle.onnx(graph), manifest.precision), "onnxruntime")
        else:
            runner = LaneRunner(lane, pipeline.backend.name, graph)
        results = Comparator.run([TorchRunner(network, graph), runner], data_loader=feeds)
        if folder is not None:
            commands += onnx_commands(bundle, graph, save_data(folder, graph.name, graph, feeds, results[0]))
        comparisons += _judged(bundle, graph, times, feeds, results)
    for number, run in enumerate(runs, len(manifest.graphs)):
        report(f"comparing {_run_name(*run)}", number, stages)
        comparisons.append(_compare_run(pipeline, sides.networks.main, sides.networks.weak, *run))
    return Parity(tuple(comparisons), tuple(commands))


def _compare_quantized(
    sides: _Sides, lane: Lane, times: Sequence[float], folder: Path | None, report: Report
) -> Parity:
    """Compare branches and guided predictions at every time of PyTorch runs, then complete runs.

    The gates are those of the bundle's build.
    """
    bundle = sides.pipeline.bundle
    guidances = built_guidances(bundle.manifest)
    comparisons: list[Comparison] = []
    feeds: dict[str, list[Feed]] = {}
    for number, guidance in enumerate(guidances):
        report(f"comparing at every time, {guidance.mode} {rates_of(guidance)}", number, len(guidances))
        networks = sides.networks
        own, compared = compare_guidance(sides.pipeline, networks.main, networks.weak, guidance, networks.encode)
        comparisons += compared
        if folder is not None:
            feeds |= feeds_of(sides.pipeline, lane, own)
    if folder is None:
        return Parity(tuple(comparisons), ())
    commands: list[str] = []
    for graph in bundle.manifest.graphs:
        network = sides.networks.of(graph)
        if graph.hoisted:
            feeds[graph.name] = [_feed(bundle.manifest, network, graph, t, k, RUN_IMAGES) for k, t in enumerate(times)]
        if graph.name in feeds:
            (wanted,) = Comparator.run([TorchRunner(network, graph)], data_loader=feeds[graph.name])
            data = save_data(folder, graph.name, graph, feeds[graph.name], wanted)
            commands += onnx_commands(bundle, graph, data)
    return Parity(tuple(comparisons), tuple(commands))


def _save_engines(
    bundle: Bundle, networks: _Networks, times: Sequence[float], folder: Path, report: Report
) -> list[str]:
    """Save inputs and PyTorch's outputs for every profile of the bundle's engines.

    Profiles of the same graph and the same number of images share a pair of files. The inputs are
    those of `_compare`; for step graphs of a quantized bundle, those of `_compare_quantized`.
    Returns the commands that compare the engines with them.
    """
    manifest = bundle.manifest
    libraries = sorted({engine.library for engine in manifest.engines})
    wanted: dict[tuple[GraphFacts, int], list[tuple[EngineFacts, int]]] = {}
    for graph, library in itertools.product(manifest.graphs, libraries):
        sizes = (manifest.hoisted_rows[graph.kind],) if graph.hoisted else manifest.engine_batches(library)
        for rows in sizes:
            if (found := manifest.engine(graph, rows, library)) is not None:
                wanted.setdefault((graph, rows), []).append(found)
    walks = []
    if wanted and manifest.quantization is not None:
        pipeline = Pipeline(bundle, TorchBackend(networks.of, RUN_IMAGES), RUN_IMAGES)
        for guidance in built_guidances(manifest):
            walks.append(reference_walk(pipeline, networks.main, networks.weak, guidance, networks.encode, noise=False))
    commands = []
    for number, ((graph, rows), profiles) in enumerate(wanted.items()):
        report(f"saving {graph.name} for {rows} rows", number, len(wanted))
        network, feeds = networks.of(graph), list[Feed]()
        if not graph.hoisted:
            pipeline = Pipeline(bundle, TorchBackend(networks.of, rows), rows)
            for own in walks:
                feeds += feeds_of(pipeline, pipeline.backend.lane(), own).get(graph.name, [])
        if not feeds:
            feeds = [_feed(manifest, network, graph, t, k, rows) for k, t in enumerate(times)]
        (results,) = Comparator.run([TorchRunner(network, graph)], data_loader=feeds)
        data = save_data(folder, f"{graph.name}-{rows}", graph, feeds, results)
        commands += [engine_command(bundle, engine, profile, data) for engine, profile in profiles]
    return commands


def _judged(
    bundle: Bundle, graph: GraphFacts, times: Sequence[float], feeds: Sequence[Feed], results: RunResults
) -> list[Comparison]:
    """Compare the second of `results`, the graph's, with the first, PyTorch's."""
    precision = bundle.manifest.precision
    comparisons: list[Comparison] = []

    def compare(wanted: Any, found: Any) -> OrderedDict[str, bool]:
        number = len(comparisons) // len(graph.outputs)
        verdicts = OrderedDict()
        for name in (tensor.name for tensor in graph.outputs):
            gates = BASES[precision].gates
            compared = compare_arrays(
                graph.name, name, times[number], wanted[name], found[name], gates.graph, gates.cosine
            )
            finite = np.isfinite(found[name]).all()
            if not finite and precision != "fp32" and graph.file is not None:
                compared = replace(compared, overflow=first_overflow(bundle.onnx(graph), feeds[number]))
            comparisons.append(compared)
            verdicts[name] = compared.passed
        return verdicts

    Comparator.compare_accuracy(results, compare_func=compare)
    return comparisons


def _emulated(bundle: Bundle) -> Pipeline:
    """Return a pipeline of the bundle on the CPU, in FP32 with the rounding of its precision."""
    wide = replace(bundle, manifest=replace(bundle.manifest, graphs=tuple(map(_wide, bundle.manifest.graphs))))
    backend = OrtBackend(wide, open_graph=functools.partial(_open, precision=bundle.manifest.precision))
    return Pipeline(wide, backend, bundle.manifest.batch or RUN_IMAGES)


def _wide(graph: GraphFacts) -> GraphFacts:
    """Return a graph with inputs and outputs in FP32 in place of half precision."""
    inputs, outputs = (
        tuple(tensor if tensor.dtype == "int64" else replace(tensor, dtype="float32") for tensor in tensors)
        for tensors in (graph.inputs, graph.outputs)
    )
    return replace(graph, inputs=inputs, outputs=outputs)


def _open(path: Path, precision: Precision) -> onnxruntime.InferenceSession:
    """Open a session over a graph.

    A half-precision graph is computed in FP32 with the rounding of half precision.
    """
    return open_session(path, None if precision == "fp32" else emulated(path))


def _feed(
    manifest: Manifest, loaded: LoadedModel, graph: GraphFacts, t: float, number: int, rows: int
) -> dict[str, NDArray[Any]]:
    """Return the inputs of one graph run of `rows` images at time `t` of a sampling run.

    The inputs are noise, conditions (among them "no class"), kept tokens, and scale 2.5. The update
    is the second half of a Heun step over a tenth of the run. number: seed of the random inputs.
    """
    generator, model = torch.Generator().manual_seed(number), manifest.model
    rows = manifest.hoisted_rows.get(graph.kind, rows)
    values = random_inputs(graph.inputs, model, {"B": rows, "S": rows}, generator)
    feed: dict[str, NDArray[Any]] = {name: value.numpy() for name, value in values.items()}
    conditions = _conditions(model, rows, number)
    time = _time(manifest, t)
    scaling = precondition(model.prediction, time)
    given = [{"t": torch.full((rows,), scaling.t), **columns_in_torch(conditions, weak=own)} for own in (False, True)]
    if graph.hoisted:
        return {tensor.name: given[0][tensor.name].numpy() for tensor in graph.inputs}
    floor = manifest.sampling.time_floor
    step = updates("heun", model.prediction, (_time(manifest, t + 0.1), time, 0.0), time_floor=floor)[1]
    scalars = {"scale": 2.5, "c_in": scaling.c_in, "c_skip": scaling.c_skip, "c_out": scaling.c_out}
    scalars |= {"a": step.a, "b": step.b, "e": step.e}
    feed |= {name: np.array(value, np.float32) for name, value in scalars.items() if name in feed}
    with torch.no_grad():
        strong, weak = (loaded.model.held(columns) for columns in given)
    held = strong | {f"{name}_weak": value for name, value in weak.items()}
    feed |= {tensor.name: to_storage(tensor, held[tensor.name]) for tensor in graph.inputs if tensor.name in held}
    # Scale the noise to the noise level of the time.
    level = np.float32(manifest.sampling.noise_scale * max(time, 1.0))
    return feed | {name: feed[name] * level for name in ("x", "r")}


def _conditions(model: ModelFacts, count: int, number: int = 0) -> Conditions:
    """Return conditions to compare at: every seventh class, every fourth "no class"; or prompts."""
    if not isinstance(model.conditions, Labels):
        return examples(model, count, number)
    labels = model.conditions
    return of_classes(labels, [labels.count if k % 4 == 1 else k * 7 % labels.count for k in range(count)])


def _time(manifest: Manifest, t: float) -> float:
    """Return `t`; for an edm model, the sigma at fraction `t` of its run, counted from the end."""
    times = manifest.sampling.times
    if isinstance(times, Shifted):
        return t
    low, high, rho = times.sigma_min, times.sigma_max, times.rho
    return float((low ** (1 / rho) + t * (high ** (1 / rho) - low ** (1 / rho))) ** rho)


def _guidances(manifest: Manifest) -> list[GuidancePlan]:
    """Return the guidances to compare.

    These are the bundle's default guidance, all others that it has graphs for, and the strong
    branch without guidance.
    """
    plan = manifest.guidance
    alone = GuidancePlan("none", plan.strong, plan.strong, plan.scale)
    others = (*built_guidances(manifest), alone)
    return [plan, *(other for other in others if (other.mode, rates_of(other)) != (plan.mode, rates_of(plan)))]


def _compare_run(
    pipeline: Pipeline,
    loaded: LoadedModel,
    weak: LoadedModel | None,
    guidance: GuidancePlan,
    sampler: SamplerName,
    fused: bool,
) -> Comparison:
    manifest, seeds = pipeline.bundle.manifest, list(range(RUN_IMAGES))
    conditions = examples(manifest.model, RUN_IMAGES)
    wanted = two_pass.sample(
        loaded,
        guidance,
        conditions,
        seeds,
        RUN_STEPS,
        sampler,
        weak=weak if guidance.row.weak_network == "weak" else None,
        levels=levels(manifest),
        weak_levels=levels(manifest, guidance.row.weak_network),
    )
    gates, name = BASES[manifest.precision].gates, _run_name(guidance, sampler, fused)
    check_reference(loaded.source, name, wanted)
    found = sampled(pipeline, conditions, seeds, steps=RUN_STEPS, sampler=sampler, guidance=guidance, fused=fused)
    return compare_arrays(name, "samples", None, wanted, found, gates.run, gates.cosine)


def _run_name(guidance: GuidancePlan, sampler: SamplerName, fused: bool) -> str:
    where = " in one graph" if fused else " in two graphs" if guidance.row.branches == 2 else ""
    return f"{RUN_STEPS} {sampler} steps, {guidance.mode} {rates_of(guidance)}{where}"
