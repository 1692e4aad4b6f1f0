"""From a checkpoint to a bundle: load, trace, check and pack, in a temporary folder that becomes the bundle."""

import errno
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import onnx
import onnx_ir as ir
import torch

from sg_engines.ort import run_once
from sg_engines.targets import check_targets
from sg_export import graphs
from sg_export.activations import first_overflow
from sg_export.checkpoint import Overrides, Weights
from sg_export.cost import count_cost
from sg_export.emulate import emulated
from sg_export.engine_build import EngineOptions, EngineSource, build_engines, check_libraries
from sg_export.graphs import GraphSpec
from sg_export.loading import LoadedModel, load_model, load_weak
from sg_export.precision import check_types, fp32_layers, half_attentions, to_half
from sg_export.progress import Report, silent
from sg_export.trace import DEFAULT_OPSET, OPSETS, trace
from sg_export.weights import write_graphs
from sg_runtime import __version__
from sg_runtime.bundle import Bundle
from sg_runtime.errors import ExportError, MissingExtraError, UsageError
from sg_runtime.files import sha256_of, temporary_beside
from sg_runtime.guidance import Ramp, scale_ends
from sg_runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Cost,
    EngineFacts,
    EngineLibrary,
    FileFacts,
    GraphFacts,
    GuidanceMode,
    GuidancePlan,
    Karras,
    Level,
    Manifest,
    NetworkName,
    Precision,
    Sampling,
    write_manifest,
)

CONDITION_ROWS = 40
"""Rows of `condition` in one run: fixed, so that a row is the same whatever is computed beside it, and as many as the
default run has steps, so that its weights are read once."""

MAX_BUILD_ERROR: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}
"""Relative L2 distance to PyTorch above which a graph is wrong: rounding stays below it, a fault far above."""

DEFAULT_SPARSITY = 0.5

EDM_NOISE_LEVELS = Karras(0.002, 80.0, 7.0)
"""Defaults of NVlabs/edm (`generate.py`, `edm_sampler`), which both families' samplers share."""

WEIGHTS_FILES: Mapping[NetworkName, str] = {"main": "weights.bin", "weak": "weights-weak.bin"}

Schedule = Literal["constant", "cosine"]
Target = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

DEFAULT_ENGINE_BATCH = 1


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What to build.

    output: the bundle's folder. sparsity, strong_sparsity: the rates of the weak and the strong branch, each in [0, 1);
    the first of each is the default of runs. guidance: the default mode; without one "sg", or "autoguidance" where
    weak_checkpoint, an earlier checkpoint of the same run, gives the weak branch. The modes with a weak sparsity (0.5
    where none is given) build guided graphs for the pairs that they allow. schedule: "cosine" makes the default
    sparsities go from the first given to the last, by way of all. scale: one, or that of the first and the last step.
    interval: the times between which guidance applies. steps: default sampling steps. weights, overrides: see
    `load_model`. force: replace an existing bundle.

    precision: the type of the matrix products, see `sg_export.precision`. targets: "onnxruntime" for ONNX graphs,
    "tensorrt-rtx" and "tensorrt" for engines; keep_onnx leaves the graphs of these in the bundle, too. batch: image
    counts; of ONNX graphs at most one, which they are then fixed to; engines have a profile for each, 1 by default.

    compute_capabilities: the GPUs that TensorRT-RTX builds for, 86 for 8.6, by default its own choice. workspace: most
    bytes of scratch memory of an engine. timing_cache: a file that TensorRT reads and extends. allow_unfused: build
    engines in which attention has no fused kernel. cache: a folder of engines built before, by default the user's.
    """

    output: Path
    sparsity: tuple[float, ...] = ()
    strong_sparsity: tuple[float, ...] = (0.0,)
    scale: Ramp = 2.0
    guidance: GuidanceMode | None = None
    weak_checkpoint: str | Path | None = None
    schedule: Schedule = "constant"
    interval: tuple[float, float] | None = None
    steps: int = 40
    precision: Precision = "fp32"
    targets: tuple[Target, ...] = ("onnxruntime",)
    batch: tuple[int, ...] = ()
    compute_capabilities: tuple[int, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    keep_onnx: bool = False
    allow_unfused: bool = False
    cache: Path | None = None
    opset: int = DEFAULT_OPSET
    weights: Weights | None = None
    overrides: Overrides = field(default_factory=Overrides)
    force: bool = False

    def __post_init__(self) -> None:
        for name, values in (("batch", self.batch), ("steps", (self.steps,))):
            for value in values:
                if value < 1:
                    raise UsageError(f"{name}: expected at least 1, found {value}")
        if self.opset not in OPSETS:
            raise UsageError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, found {self.opset}")
        if not self.strong_sparsity:
            raise UsageError("strong_sparsity: expected at least one, found none")
        if self.schedule not in get_args(Schedule):
            raise UsageError(f"schedule: expected one of {', '.join(get_args(Schedule))}, found {self.schedule!r}")
        if self.mode in ("none", "cfg") and self.sparsity:
            raise UsageError(
                f"sparsity: {self.mode} guidance has no sparser branch: give strong_sparsity, or guidance sg"
            )
        if (self.mode == "autoguidance") != (self.weak_checkpoint is not None):
            found = "none" if self.weak_checkpoint is None else f"{self.weak_checkpoint} for {self.mode}"
            raise UsageError(f"weak_checkpoint: expected one for autoguidance and for no other mode, found {found}")

        self._check_targets()

    def _check_targets(self) -> None:
        for name, value, known in (
            ("precision", self.precision, get_args(Precision)),
            *(("target", target, get_args(Target)) for target in self.targets),
        ):
            if value not in known:
                raise UsageError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        if not self.targets:
            raise UsageError("target: expected at least one, found none")
        if "onnxruntime" in self.targets:
            if len(self.batch) > 1:
                raise UsageError(
                    f"batch: expected at most one for ONNX graphs, which are fixed to it, found {len(self.batch)}: "
                    f"leave it out, and they take any"
                )
            if self.precision == "bf16":
                raise UsageError(
                    "precision bf16: ONNX Runtime's CPU provider has none: give fp32 or fp16, or --target tensorrt-rtx"
                )
        libraries = self.libraries
        if not libraries:
            for number in self.compute_capabilities:
                raise UsageError(f"--sm {number}: only for engines: give --target tensorrt-rtx")
            for name in ("workspace", "timing_cache", "keep_onnx", "allow_unfused"):
                if getattr(self, name):
                    raise UsageError(f"{name}: only for engines: give --target tensorrt-rtx or tensorrt")
        if "tensorrt" in libraries and "tensorrt_rtx" not in libraries:
            check_targets("tensorrt", self.compute_capabilities, ())
        if "tensorrt_rtx" in libraries:
            products = {self.precision} if self.whole else {self.precision, "fp32"}
            check_targets("tensorrt_rtx", self.compute_capabilities, products)

    @property
    def libraries(self) -> tuple[EngineLibrary, ...]:
        """The libraries of the engines that are built."""
        known: dict[Target, EngineLibrary] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
        return tuple(known[target] for target in dict.fromkeys(self.targets) if target in known)

    @property
    def whole(self) -> bool:
        """Whether no product may be in FP32: one of the GPUs has none."""
        return self.precision == "fp16" and 75 in self.compute_capabilities

    @property
    def mode(self) -> GuidanceMode:
        """The guidance mode, given or implied."""
        return self.guidance or ("sg" if self.weak_checkpoint is None else "autoguidance")


def compile(checkpoint: str | Path, options: CompileOptions, report: Report = silent) -> Bundle:
    """Compile a checkpoint, or a reference model by its name, into a bundle.

    report: called with a line at the start of each stage. Raises UsageError for a request that cannot be served,
    CheckpointError for an unusable checkpoint, ExportError where a graph cannot be made or does not agree with PyTorch.
    Nothing is left behind on failure, and an existing bundle stays until its successor is whole.
    """
    _check_output(options.output, options.force)
    check_libraries(options.libraries)
    report(f"loading {checkpoint}", 0, None)
    loaded = load_model(checkpoint, weights=options.weights, overrides=options.overrides)
    weak = None
    if options.weak_checkpoint is not None:
        report(f"loading {options.weak_checkpoint}", 0, None)
        weak = load_weak(options.weak_checkpoint, loaded, options.weights, options.overrides)
    plan, specs = plan_build(loaded, weak, options)
    if not _has_onnx(options) and graphs.guided_alone(plan):
        specs = [spec for spec in specs if spec.kind in ("condition", "guided")]
    layers = fp32_layers(loaded.model, options.precision, whole=options.whole)
    with _new_folder(options.output, options.force) as folder:
        facts, engines = _write({"main": loaded, "weak": weak}, plan, specs, layers, options, folder, report)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            created_by=f"sg-export {__version__}",
            model=loaded.facts,
            guidance=plan,
            sampling=(
                Sampling("euler", options.steps, None)
                if loaded.facts.prediction == "flow"
                else Sampling("heun", options.steps, EDM_NOISE_LEVELS)
            ),
            precision=options.precision,
            fp32_layers=layers,
            opset=options.opset,
            batch=_graph_batch(options),
            condition_rows=CONDITION_ROWS,
            graphs=facts,
            engines=engines,
            source=loaded.source,
            weak_source=None if weak is None else weak.source,
            files={
                path.relative_to(folder).as_posix(): FileFacts(path.stat().st_size, sha256_of(path))
                for path in sorted((*(folder / "graphs").glob("*"), *(folder / "engines").glob("*")))
            },
        )
        write_manifest(manifest, folder / MANIFEST_FILE)
    return Bundle(options.output, manifest)


def plan_build(
    loaded: LoadedModel, weak_loaded: LoadedModel | None, options: CompileOptions
) -> tuple[GuidancePlan, list[GraphSpec]]:
    """The bundle's guidance plan and its graphs. Raises UsageError for what the model or this version cannot do."""
    mode = options.mode
    strong = _levels(loaded, options.strong_sparsity)
    weak = strong
    if mode not in ("none", "cfg"):
        weak = _levels(weak_loaded or loaded, options.sparsity or (DEFAULT_SPARSITY,))
    if weak_loaded is None:
        _check_distinct({*strong, *weak})
    if mode in ("sg", "cfg+sg") and options.schedule == "constant":
        for level in weak:
            if level.sparsity == 0:
                raise UsageError("sparsity 0: keeps all tokens: expected a weak branch that leaves some out")

    def last(levels: Sequence[Level]) -> Level | None:
        return levels[-1] if options.schedule == "cosine" and len(levels) > 1 else None

    scale, scale_last = scale_ends(options.scale)
    plan = GuidancePlan(mode, strong[0], weak[0], scale, last(strong), last(weak), scale_last, options.interval)
    return plan, graphs.plan_graphs(mode, strong, weak)


def _levels(loaded: LoadedModel, sparsities: Sequence[float]) -> list[Level]:
    levels = [loaded.level(sparsity) for sparsity in sparsities]
    _check_distinct(levels)
    return levels


def _check_distinct(levels: Iterable[Level]) -> None:
    """A graph is known by the tokens that it keeps: each count may come from one sparsity alone."""
    for a, b in itertools.combinations(sorted(levels, key=lambda level: level.sparsity), 2):
        if a.keep == b.keep:
            raise UsageError(
                f"sparsities {a.sparsity:g} and {b.sparsity:g} both keep {a.keep} tokens: give one of them"
            )


def _has_onnx(options: CompileOptions) -> bool:
    """Whether the bundle carries ONNX graphs."""
    return "onnxruntime" in options.targets or options.keep_onnx


def _graph_batch(options: CompileOptions) -> int | None:
    """The image count that the ONNX graphs are fixed to, None where it is symbolic."""
    return options.batch[0] if options.batch and not options.libraries else None


def _write(
    loaded: Mapping[NetworkName, LoadedModel | None],
    plan: GuidancePlan,
    specs: Sequence[GraphSpec],
    layers: tuple[str, ...],
    options: CompileOptions,
    folder: Path,
    report: Report,
) -> tuple[tuple[GraphFacts, ...], tuple[EngineFacts, ...]]:
    """Trace, write and check all graphs in `folder`/graphs, and build engines of those that the plan uses.

    Graphs for engines have symbolic token counts, so that one file is the graphs of all levels.
    """
    symbolic, batch = bool(options.libraries), _graph_batch(options)
    files: dict[str, list[GraphSpec]] = {}
    for spec in specs:
        files.setdefault(spec.shared_name if symbolic else spec.name, []).append(spec)
    engine_files = {
        name: own
        for name, own in files.items()
        if symbolic and (own[0].kind in ("condition", "guided") or not graphs.guided_alone(plan))
    }
    stages = len(files) + 1 + len(specs) + len(engine_files) * len(options.libraries)
    traced: dict[NetworkName, list[ir.Model]] = {network: [] for network in WEIGHTS_FILES}
    costs: dict[GraphSpec, Cost] = {}
    attentions: dict[str, int] = {}
    for number, (name, own) in enumerate(files.items()):
        report(f"tracing {name}", number, stages)
        source = loaded[own[0].network]
        assert source is not None
        model = trace(source.model, own[0], source.facts, batch, options.opset, symbolic_keep=symbolic)
        if options.precision != "fp32":
            to_half(model.graph, options.precision, layers)
        traced[own[0].network].append(model)
        attentions[name] = half_attentions(model.graph)
        for spec in own:
            costs[spec] = count_cost(model.graph, graphs.keep_sizes(spec, [level.keep for level in spec.levels]))
    report("writing graphs and weights", len(files), stages)
    (folder / "graphs").mkdir()
    for network, models in traced.items():
        if models:
            write_graphs(models, folder / "graphs", WEIGHTS_FILES[network])
    facts: list[GraphFacts] = []
    for name, own in files.items():
        path = folder / "graphs" / f"{name}.onnx"
        for spec in own:
            report(f"checking {spec.name}", len(files) + 1 + len(facts), stages)
            source = loaded[spec.network]
            assert source is not None
            if spec is own[0]:
                check_graph(path)
                check_types(path, options.precision, layers)
            facts.append(
                GraphFacts(
                    name=spec.name,
                    kind=spec.kind,
                    network=spec.network,
                    levels=spec.levels,
                    file=f"graphs/{path.name}" if _has_onnx(options) else None,
                    inputs=graphs.inputs(spec, source.facts, batch),
                    outputs=graphs.outputs(spec, source.facts, batch),
                    cost=costs[spec],
                    parity=_parity(source, spec, path, batch, options.precision),
                )
            )
    sources = [
        EngineSource(
            path=folder / "graphs" / f"{name}.onnx",
            weights=folder / "graphs" / WEIGHTS_FILES[own[0].network],
            specs=tuple(own),
            half_attentions=attentions[name],
            weight_bytes=costs[own[0]].weight_bytes,
        )
        for name, own in engine_files.items()
    ]
    engines = _engines(loaded, sources, options, folder, report, stages)
    if not _has_onnx(options):
        shutil.rmtree(folder / "graphs")
    return tuple(facts), engines


def _engines(
    loaded: Mapping[NetworkName, LoadedModel | None],
    sources: Sequence[EngineSource],
    options: CompileOptions,
    folder: Path,
    report: Report,
    stages: int,
) -> tuple[EngineFacts, ...]:
    """Engines in `folder`/engines."""
    if not options.libraries:
        return ()
    main = loaded["main"]
    assert main is not None
    engine_options = EngineOptions(
        libraries=options.libraries,
        batches=tuple(sorted(set(options.batch))) or (DEFAULT_ENGINE_BATCH,),
        compute_capabilities=tuple(sorted(set(options.compute_capabilities))),
        workspace=options.workspace,
        timing_cache=options.timing_cache,
        allow_unfused=options.allow_unfused,
        cache=options.cache,
    )
    first = stages - len(sources) * len(options.libraries)
    return build_engines(
        sources,
        main.facts,
        CONDITION_ROWS,
        engine_options,
        folder / "engines",
        lambda stage, done, total, share=None: report(stage, first + done, stages, share),
    )


def check_graph(path: Path) -> None:
    """ONNX's checker and strict shape inference, by path, so that weights beyond 2 GB are no matter.

    Raises ExportError with ONNX's reason.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            onnx.checker.check_model(str(path), full_check=False)
            inferred = Path(scratch) / path.name
            onnx.shape_inference.infer_shapes_path(
                str(path), str(inferred), check_type=True, strict_mode=True, data_prop=True
            )
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"graph {path.name}: ONNX {onnx.__version__} refuses it: {error}") from error


def _parity(loaded: LoadedModel, spec: GraphSpec, path: Path, batch: int | None, precision: Precision) -> float | None:
    """Relative L2 distance of the graph to PyTorch on one random input; None where ONNX Runtime is not installed."""
    inputs = graphs.inputs(spec, loaded.facts, batch)
    generator = torch.Generator().manual_seed(1)
    values = [graphs.example(t, loaded.facts.tokens, {"B": 2, "S": 2}, generator) for t in inputs]
    try:
        feeds = {t.name: v.numpy() for t, v in zip(inputs, values, strict=True)}
        found = run_once(path, feeds, None if precision == "fp32" else emulated(path))
    except MissingExtraError:
        return None
    with torch.no_grad():
        wanted = graphs.GraphModule(loaded.model, spec, [t.name for t in inputs])(*values)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    # An untrained network's output is zero.
    distance = max(
        float((torch.from_numpy(f) - w).norm() / w.norm().clamp(min=1e-12)) for f, w in zip(found, wanted, strict=True)
    )
    if not math.isfinite(distance) and precision != "fp32" and (operator := first_overflow(path, feeds)) is not None:
        raise ExportError(
            f"graph {path.name}: expected values that {precision} holds, found larger ones from {operator} on: build "
            f"with --precision bf16 or fp32"
        )
    if not distance <= MAX_BUILD_ERROR[precision]:
        raise ExportError(
            f"graph {path.name}: relative L2 distance to PyTorch: expected at most {MAX_BUILD_ERROR[precision]:g}, "
            f"found {distance:g}; please report this with the versions that sg-export doctor prints"
        )
    return distance


def _check_output(output: Path, force: bool) -> None:
    """Raise UsageError where `output` exists and may not be replaced: without `force`, or if it is no bundle."""
    target = output.resolve()  # "new/.." is a folder that exists
    if not target.exists():
        return
    if not force:
        raise UsageError(f"{output}: exists: give another --output, or --force to replace it")
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not _is_bundle(target):
        raise UsageError(f"{output}: exists and is no bundle, so --force does not replace it: give another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether the folder has a manifest that sg-export wrote, of whatever schema."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("created_by")).startswith("sg-export")


@contextmanager
def _new_folder(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block succeeds, and goes when it fails.

    A bundle that is there already stays, or comes back, whatever happens until its successor is in place.
    """
    target = output.resolve()  # "." has no name, and a link is not what gets replaced
    temporary, old = temporary_beside(target), temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(_disk_message(output, error)) from None
        raise UsageError(f"{output}: cannot be written ({error.strerror}): give another --output") from None
    try:
        yield temporary
        _check_output(output, force)  # again: another build may have ended meanwhile
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except OSError as error:
        raise ExportError(_disk_message(output, error)) from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def _disk_message(output: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{output}: the disk is full; free some space, or give an --output on another disk"
    return f"{output}: cannot be written ({error.strerror or error})"
