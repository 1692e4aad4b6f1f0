"""Parity of a bundle with its checkpoint in PyTorch, by Polygraphy: every graph over time, and whole sampling runs."""

import functools
import json
import os
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polygraphy
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from sg_calibration.feeds import images_of
from sg_calibration.settings import LEAST_STRATA
from sg_export import graphs, two_pass
from sg_export.activations import first_overflow
from sg_export.checkpoint import Overrides, Weights
from sg_export.emulate import emulated
from sg_export.loading import LoadedModel, load_model, load_weak
from sg_export.progress import Report, silent
from sg_export.quality import by_pipeline, by_pytorch, sampled, walk
from sg_export.reference import REFERENCES, reference_path
from sg_export.runners import LaneRunner, TorchRunner
from sg_runtime.backends.ort import OrtBackend, open_session
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, CheckpointError, UsageError
from sg_runtime.files import replacing, sha256_of
from sg_runtime.guidance import built_guidances, guide, levels
from sg_runtime.manifest import GraphFacts, GuidancePlan, Manifest, Precision, SamplerName, Source
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import SAMPLERS, precondition, updates

TIMES = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.98)
IMAGES = 2
RUN_STEPS = 10


@dataclass(frozen=True, slots=True)
class Gates:
    """The most relative L2 of one graph run and of a whole run, and the least cosine similarity of both."""

    graph: float
    run: float
    cosine: float


GATES: Mapping[Precision, Gates] = {
    "fp32": Gates(1e-5, 1e-4, 0.99999),
    "fp16": Gates(2e-2, 2e-2, 0.9995),
    "bf16": Gates(2e-2, 2e-2, 0.9995),
}
"""FP32: summation order alone gives about 1e-6 at the depth of XL/2, and guidance and sampling multiply the rounding of
single runs by up to some tens. Half precision: of two images 2 % apart none can be told from the other; steps round
independently, so that a run is no further off than one of its evaluations. The cosines follow from these with room;
they catch a wrong sign or order at a glance."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison with PyTorch. time: t of a graph run, None for a whole run. gate: the most relative L2 allowed.

    overflow: the first operator of the graph that gave an infinity or a NaN, None where all is finite.
    """

    subject: str
    output: str
    time: float | None
    max_abs: float
    relative_l2: float
    cosine: float
    gate: float
    passed: bool
    overflow: str | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """All comparisons of a bundle, and the Polygraphy commands that repeat them where their data was saved."""

    comparisons: tuple[Comparison, ...]
    commands: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison did."""
        return all(comparison.passed for comparison in self.comparisons)


def verify(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    *,
    weak_checkpoint: str | Path | None = None,
    device: str | None = None,
    backend: str | None = None,
    times: Sequence[float] = TIMES,
    save_polygraphy: Path | None = None,
    report: Report = silent,
) -> Parity:
    """Compare a bundle with its checkpoint, reloaded through the adapter.

    checkpoint, weak_checkpoint: by default the reference model, or the file of that name beside the bundle or here.
    device, backend: what runs the bundle, see `Pipeline.load`; without either the graphs run on the CPU, those in half
    precision in FP32 with their rounding. times: in (0, 1]; an edm model is compared at the noise levels that lie as
    far along its run. save_polygraphy: a folder for inputs and PyTorch's outputs in Polygraphy's format.

    Raises CheckpointError where the checkpoint is missing or not the one that the bundle was built from, BundleError
    for a damaged bundle.
    """
    opened = Bundle.open(bundle)
    if device is None and backend is None:
        opened.onnx(opened.manifest.condition("main"))  # raises where there are engines alone
        pipeline = _emulated(opened)
        lane = None
    else:
        pipeline = Pipeline.load(bundle, device or "auto", backend=backend, verify_hashes=False)
        lane = pipeline.backend.lane()
        lane.enter()
    loaded = reload_checkpoint(opened, checkpoint)
    weak = reload_weak(opened, weak_checkpoint, loaded)
    networks = {"main": loaded, "weak": weak or loaded}
    if save_polygraphy is not None:
        save_polygraphy.mkdir(parents=True, exist_ok=True)
    comparisons: list[Comparison] = []
    commands: list[str] = []
    G_LOGGER.module_severity = {"": G_LOGGER.ERROR}
    if opened.manifest.quantization is not None:
        for guidance in built_guidances(opened.manifest):
            report(f"comparing at every time, {guidance.mode} {_rates(guidance)}", 0, None)
            comparisons += _compare_quantized(pipeline, loaded, weak, guidance)
        return Parity(tuple(comparisons), ())
    singles = any(graph.kind in ("dense", "sparse") for graph in opened.manifest.graphs)
    runs = [
        (guidance, sampler, fused)
        for guidance in _guidances(opened.manifest)
        for sampler in SAMPLERS
        for fused in ((True, False) if guidance.mode in ("sg", "cfg", "cfg+sg") else (False,))
        if fused or singles
    ]
    stages = len(opened.manifest.graphs) + len(runs)
    rows = IMAGES if pipeline.backend.batches is None else pipeline.backend.batches[0]
    for number, graph in enumerate(opened.manifest.graphs):
        report(f"comparing {graph.name}", number, stages)
        feeds = [_feed(opened.manifest, networks[graph.network], graph, t, k, rows) for k, t in enumerate(times)]
        if lane is None:
            runner = OnnxrtRunner(
                functools.partial(_open, opened.onnx(graph), opened.manifest.precision), "onnxruntime"
            )
        else:
            runner = LaneRunner(lane, pipeline.backend.name, graph)
        comparisons += _compare_graph(opened, networks[graph.network], graph, runner, times, feeds, save_polygraphy)
        # Polygraphy runs ONNX files alone, and none in BF16 here.
        if save_polygraphy is not None and graph.file is not None and opened.manifest.precision != "bf16":
            commands.append(_polygraphy_command(opened, graph, save_polygraphy))
    for number, run in enumerate(runs, len(opened.manifest.graphs)):
        report(f"comparing {_run_name(*run)}", number, stages)
        comparisons.append(_compare_run(pipeline, loaded, weak, *run))
    return Parity(tuple(comparisons), tuple(commands))


def write_parity(parity: Parity, bundle: Bundle, path: Path) -> None:
    """Write the comparisons with the versions they were made with as JSON."""
    weak_source = bundle.manifest.weak_source
    content = {
        "bundle": bundle.path.name,
        "source": asdict(bundle.manifest.source),
        "weak_source": None if weak_source is None else asdict(weak_source),
        "passed": parity.passed,
        "versions": {module.__name__: module.__version__ for module in (torch, onnxruntime, polygraphy, np)},
        "threads": {"torch": torch.get_num_threads(), "machine": os.cpu_count()},
        "comparisons": [asdict(comparison) for comparison in parity.comparisons],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def reload_checkpoint(bundle: Bundle, checkpoint: str | Path | None) -> LoadedModel:
    """Load the checkpoint that the manifest names, with the facts that it was built with."""
    source, model = bundle.manifest.source, bundle.manifest.model
    path = _find(bundle, source, checkpoint, "--checkpoint")
    loaded = load_model(path, weights=_weights(source), overrides=_stated(bundle))
    if loaded.facts != model:
        raise BundleError(f"{bundle.path}: its manifest describes another model than {path}: build it anew")
    return loaded


def reload_weak(bundle: Bundle, checkpoint: str | Path | None, strong: LoadedModel) -> LoadedModel | None:
    """Load the checkpoint of the weak network, where the bundle has one."""
    source = bundle.manifest.weak_source
    if source is None:
        if checkpoint is not None:
            raise UsageError(f"{bundle.path}: has no weak network: leave out --weak-checkpoint")
        return None
    path = _find(bundle, source, checkpoint, "--weak-checkpoint")
    return load_weak(path, strong, _weights(source), _stated(bundle))


def _stated(bundle: Bundle) -> Overrides:
    """What was known of the model when the bundle was built."""
    model = bundle.manifest.model
    return Overrides(model.route, model.heads, model.prediction)


def _weights(source: Source) -> Weights | None:
    return None if source.weights == "bare" else source.weights


def _find(bundle: Bundle, source: Source, checkpoint: str | Path | None, option: str) -> str | Path:
    """The file of `source`, or the name of the reference model that it is; its hash is that of the manifest."""
    if checkpoint is None:
        candidates = [bundle.path.parent / source.file, Path(source.file)]
        found = [path for path in candidates if path.is_file()]
        checkpoint = source.reference if source.reference in REFERENCES else next(iter(found), None)
        if checkpoint is None:
            raise CheckpointError(
                f"{bundle.path}: its checkpoint {source.file} is neither beside the bundle nor here: give {option}"
            )
    path = reference_path(str(checkpoint)) if str(checkpoint) in REFERENCES else Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the checkpoint of {bundle.path}, {source.file}, found nothing there")
    if (found_hash := sha256_of(path)) != source.sha256:
        raise CheckpointError(
            f"{path}: expected SHA-256 {source.sha256[:12]}…, from which {bundle.path} was built, "
            f"found {found_hash[:12]}…: give its checkpoint, or build a new bundle from this one"
        )
    return checkpoint


def _compare_graph(
    bundle: Bundle,
    loaded: LoadedModel,
    graph: GraphFacts,
    runner: BaseRunner,
    times: Sequence[float],
    feeds: Sequence[dict[str, NDArray[Any]]],
    folder: Path | None,
) -> list[Comparison]:
    precision = bundle.manifest.precision
    results = Comparator.run([TorchRunner(loaded, graph), runner], data_loader=feeds)
    if folder is not None:
        stem = graph.name
        save_json(feeds, str(folder / f"{stem}-inputs.json"))
        RunResults([results[0]]).save(str(folder / f"{stem}-outputs.json"))
    comparisons: list[Comparison] = []

    def compare(wanted: Any, found: Any) -> OrderedDict[str, bool]:
        number = len(comparisons) // len(graph.outputs)
        verdicts = OrderedDict()
        for name in (tensor.name for tensor in graph.outputs):
            gates = GATES[precision]
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
    """The bundle on the CPU, in FP32 with the rounding of its precision."""
    backend = OrtBackend(bundle, open_graph=functools.partial(_open, precision=bundle.manifest.precision))
    return Pipeline(bundle, backend, bundle.manifest.batch or IMAGES)


def _open(path: Path, precision: Precision) -> onnxruntime.InferenceSession:
    """A session over a graph; one in half precision is computed in FP32 with the rounding of half precision."""
    return open_session(path, None if precision == "fp32" else emulated(path))


def compare_arrays(
    subject: str,
    output: str,
    t: float | None,
    wanted: NDArray[np.float32],
    found: NDArray[np.float32],
    gate: float,
    least_cosine: float,
) -> Comparison:
    """Distances of `found` to `wanted`, in float64; a NaN or an infinity anywhere fails."""
    a, b = wanted.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a))
    relative = float(np.linalg.norm(b - a)) / max(norm, 1e-12)
    cosine = float(a @ b) / max(norm * float(np.linalg.norm(b)), 1e-12)
    passed = relative <= gate and cosine >= least_cosine
    return Comparison(subject, output, t, float(np.abs(b - a).max()), relative, cosine, gate, bool(passed))


def _feed(
    manifest: Manifest, loaded: LoadedModel, graph: GraphFacts, t: float, number: int, rows: int
) -> dict[str, NDArray[Any]]:
    """Inputs of one graph run of `rows` images, `t` along a run.

    Noise, two classes (the second is "no class"), subsets, scale 2.5. The update is that of a Heun step's second half,
    of a tenth of the run.
    """
    generator = torch.Generator().manual_seed(number)
    sizes = {"B": rows, "S": manifest.condition_rows}
    feed = {
        tensor.name: graphs.example(tensor, manifest.model.tokens, sizes, generator).numpy() for tensor in graph.inputs
    }
    classes = torch.arange(max(sizes.values())) * 7 % manifest.model.num_classes
    classes[1::4] = manifest.model.num_classes
    time = _time(manifest, t)
    scaling = precondition(manifest.model.prediction, time)
    if graph.kind == "condition":
        return feed | {"t": np.full(sizes["S"], scaling.t, np.float32), "class": classes[: sizes["S"]].numpy()}
    step = updates("heun", manifest.model.prediction, (_time(manifest, t + 0.1), time, 0.0))[1]
    scalars = {"scale": 2.5, "c_in": scaling.c_in, "c_skip": scaling.c_skip, "c_out": scaling.c_out}
    scalars |= {"a": step.a, "b": step.b, "e": step.e}
    feed |= {name: np.array(value, np.float32) for name, value in scalars.items() if name in feed}
    conditions = {"modulations": classes[:rows], "modulations_weak": torch.full((rows,), manifest.model.num_classes)}
    with torch.no_grad():
        for name, labels in conditions.items():
            if name in feed:
                feed[name] = loaded.model.condition(torch.full((rows,), scaling.t), labels).numpy()
    # A state as far from the data as the time says.
    return feed | {name: feed[name] * np.float32(max(time, 1.0)) for name in ("x", "r")}


def _time(manifest: Manifest, t: float) -> float:
    """t itself, or the sigma of an edm model that lies a share `t` from the end of its run."""
    if manifest.sampling.karras is None:
        return t
    low, high = manifest.sampling.karras.sigma_min, manifest.sampling.karras.sigma_max
    rho = manifest.sampling.karras.rho
    return float((low ** (1 / rho) + t * (high ** (1 / rho) - low ** (1 / rho))) ** rho)


def _guidances(manifest: Manifest) -> list[GuidancePlan]:
    """The bundle's own plan, every other pair it has a graph for, and the strong branch alone."""
    plan = manifest.guidance
    alone = GuidancePlan("none", plan.strong, plan.strong, plan.scale)
    others = (*built_guidances(manifest), alone)
    return [plan, *(other for other in others if (other.mode, _rates(other)) != (plan.mode, _rates(plan)))]


def _rates(guidance: GuidancePlan) -> str:
    """Strong and weak sparsity as a user writes them, FIRST:LAST where they change; one where both are the same."""
    ends = [(guidance.strong, guidance.strong_last), (guidance.weak, guidance.weak_last)]
    shown = [f"{first.sparsity:g}" + ("" if last is None else f":{last.sparsity:g}") for first, last in ends]
    return "/".join(shown[:1] if guidance.mode in ("none", "cfg") else shown)


def _compare_run(
    pipeline: Pipeline,
    loaded: LoadedModel,
    weak: LoadedModel | None,
    guidance: GuidancePlan,
    sampler: SamplerName,
    fused: bool,
) -> Comparison:
    manifest, count = pipeline.bundle.manifest, loaded.facts.num_classes
    classes, seeds = [k * 7 % count for k in range(IMAGES)], list(range(IMAGES))
    wanted = two_pass.sample(
        loaded,
        guidance,
        classes,
        seeds,
        RUN_STEPS,
        sampler,
        weak=weak if guidance.weak_network == "weak" else None,
        levels=levels(manifest),
        weak_levels=levels(manifest, guidance.weak_network),
        karras=manifest.sampling.karras,
    )
    found = sampled(pipeline, classes, seeds, steps=RUN_STEPS, sampler=sampler, guidance=guidance, fused=fused)
    gates, name = GATES[manifest.precision], _run_name(guidance, sampler, fused)
    return compare_arrays(name, "samples", None, wanted, found, gates.run, gates.cosine)


def _compare_quantized(
    pipeline: Pipeline, loaded: LoadedModel, weak: LoadedModel | None, guidance: GuidancePlan
) -> list[Comparison]:
    """Branches and guided prediction at every time of a run of PyTorch's, by the bundle's gates; then a whole run.

    Beside that stands how far another draw of token subsets would lead.
    """
    manifest = pipeline.bundle.manifest
    assert manifest.quantization is not None
    gates = manifest.quantization.gates
    classes, seeds = images_of("gate", manifest.model, IMAGES)
    own = walk(pipeline, by_pytorch(loaded, weak, classes), guidance, classes, seeds, LEAST_STRATA)
    plan, branches = pipeline.prepare(own.times, classes, seeds, guidance=guidance), by_pipeline(pipeline)
    comparisons = []
    name = f"{guidance.mode} {_rates(guidance)}"
    for index, time in enumerate(own.times):
        wanted = own.strong[index], own.weak[index]
        found = branches(own.states[index], plan, index)
        for branch, w, f in zip(("strong", "weak"), wanted, found, strict=True):
            comparisons.append(compare_arrays(name, f"{branch} branch", time, w, f, 1.0, gates.cosine))
        both = guide(*wanted, guidance.scale), guide(*found, guidance.scale)
        comparisons.append(compare_arrays(name, "guided", time, *both, gates.guided, -1.0))
    samples = sampled(pipeline, classes, seeds, steps=len(own.times), sampler="euler", guidance=guidance)
    subject = f"{len(own.times)} euler steps, {name}; other subsets: {own.mask_noise:.2%}"
    comparisons.append(compare_arrays(subject, "samples", None, own.samples, samples, gates.guided, -1.0))
    return comparisons


def _run_name(guidance: GuidancePlan, sampler: SamplerName, fused: bool) -> str:
    where = " in one graph" if fused else " in two graphs" if guidance.mode != "none" else ""
    return f"{RUN_STEPS} {sampler} steps, {guidance.mode} {_rates(guidance)}{where}"


def _polygraphy_command(bundle: Bundle, graph: GraphFacts, folder: Path) -> str:
    stem = graph.name
    words = ["polygraphy", "run", str(bundle.onnx(graph)), "--onnxrt"]
    words += ["--load-inputs", str(folder / f"{stem}-inputs.json")]
    tolerance = "1e-4" if bundle.manifest.precision == "fp32" else "2e-2"
    words += ["--load-outputs", str(folder / f"{stem}-outputs.json"), "--atol", tolerance, "--rtol", tolerance]
    return shlex.join(words)
