"""Measure which parts of a half-precision graph must stay in FP32.

    python -m benchmarks.precision_policies --output benchmarks/results/precision_policies.json

The guided prediction of each policy is compared with FP32. Errors are relative L2 distances at
eight times to the same graphs in FP32. The policy also applies to the conditioning. Half precision
is emulated (`sg_export/graph/emulate.py`): FP32 operators with rounded inputs and outputs.
TensorRT-RTX builds an engine of the guided graph without a GPU. S/2 has random weights. Policies:

whole            every value is in half precision
ends             all products are in half precision, except the embedders and the head
ends + after     as `ends`, and the layer after the route is in FP32, too
ours             policy of `sg-export build`: one of these two, depending on the precision
autocast         ModelOpt's `convert_to_mixed_precision` with its defaults, if nvidia-modelopt is
                 installed
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.engine_builds import load
from benchmarks.machine import machine
from sg_engines.child import build_in_child
from sg_engines.trt import EngineRecipe
from sg_export import LoadedModel
from sg_export.graph.emulate import emulated
from sg_export.graph.half import HALF, cast, fp32_layers, half_attentions, to_half
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.overflow import range_shares
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.models.dit import ENDS
from sg_export.packing.engines import count_fused_attention, profile_shapes
from sg_export.parity.verify import TIMES
from sg_runtime import philox
from sg_runtime.backends.ort import open_session
from sg_runtime.errors import EngineError
from sg_runtime.manifest import HalfPrecision, Profile
from sg_runtime.run.kept import restore, rows

Array = NDArray[np.float32]
IMAGES, SCALE = 4, 2.5
MODELS = {"glyphs": (0.25, 0.9), "S/2": (0.5, 0.9)}
"""Sparsities of the strong and the weak branch of each model."""


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one policy.

    model: name of the model.
    precision: half-precision type.
    policy: name of the policy.
    fp32_layers: layers that the policy keeps in FP32.
    errors: relative L2 error at each of `TIMES`.
    worst: largest of these errors.
    errors_of_onnxruntime: errors on its CPU provider without emulation; None for BF16.
    largest: largest activation, as a share of the type's range.
    largest_in: node of the largest activation.
    engine_mb: size of the engine; None if TensorRT-RTX refused the graph.
    half_attentions: number of attentions with half-precision matmuls in the graph.
    fused_attentions: number of fused attention kernels in the engine; None if there is no engine.
    refused: error of the engine build; None if it succeeded.

    The CPU provider of ONNX Runtime has no BF16.
    """

    model: str
    precision: HalfPrecision
    policy: str
    fp32_layers: tuple[str, ...]
    errors: tuple[float, ...]
    worst: float
    errors_of_onnxruntime: tuple[float, ...] | None
    largest: float
    largest_in: str
    engine_mb: float | None
    half_attentions: int
    fused_attentions: int | None
    refused: str | None


@dataclass(frozen=True, slots=True)
class Graphs:
    """Paths of a policy's condition graph and guided graph."""

    condition: Path
    guided: Path


Policy = Callable[[ir.Model], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.model:
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(name, load(name, Path(scratch)), Path(scratch))
    if options.output:
        libraries = ["torch", "onnx", "onnxruntime", "tensorrt-rtx"] + ["nvidia-modelopt"] * has_modelopt()
        content = {"machine": machine(*libraries), "times": TIMES, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def has_modelopt() -> bool:
    """Return whether ModelOpt's ONNX part is installed."""
    return find_spec("modelopt") is not None and find_spec("onnx_graphsurgeon") is not None


def measure(name: str, loaded: LoadedModel, folder: Path) -> list[Row]:
    """Compare all policies of both half-precision types with FP32."""
    spec = GraphSpec("guided", tuple(loaded.level(rate) for rate in MODELS[name]))
    plain = write(loaded, spec, folder / "fp32", lambda model: None)
    wanted = predictions(plain, loaded, spec, exact=True)
    rows = []
    for precision in HALF:
        after = loaded.model.network.layer_name(loaded.model.route.end + 1)
        layers = {
            "ends": ENDS,
            "ends + after": (*ENDS, after),
            "ours": fp32_layers(loaded.model, precision),
        }
        policies: dict[str, Policy] = {"whole": partial(to_whole, precision=precision)}
        policies |= {key: partial(to_layers, precision=precision, layers=own) for key, own in layers.items()}
        for policy, change in policies.items():
            graphs = write(loaded, spec, folder / f"{precision}-{policy}", change)
            row = judge(name, precision, policy, layers.get(policy, ()), graphs, loaded, spec, wanted)
            rows.append(row)
            print(row, flush=True)
        if has_modelopt():
            graphs = autocast(plain, folder / f"{precision}-autocast", precision)
            rows.append(judge(name, precision, "autocast", (), graphs, loaded, spec, wanted))
            print(rows[-1], flush=True)
    return rows


def write(loaded: LoadedModel, spec: GraphSpec, folder: Path, change: Policy) -> Graphs:
    """Trace both graphs with symbolic token counts, apply `change` and write them."""
    folder.mkdir()
    specs = [GraphSpec("condition"), spec]
    models = trace(loaded.model, specs, loaded.facts, None, DEFAULT_OPSET, symbolic_keep=True)
    for model in models:
        change(model)
    condition, guided = write_graphs(models, folder, "weights.bin")
    return Graphs(condition, guided)


def to_layers(model: ir.Model, precision: HalfPrecision, layers: Sequence[str]) -> None:
    """Convert to half precision by our rule, with `layers` in FP32."""
    to_half(model.graph, precision, layers)


def to_whole(model: ir.Model, precision: HalfPrecision) -> None:
    """Convert every float value to half precision, from the inputs on."""
    graph = model.graph
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            uses = list(value.uses())
            lowered = cast(graph, value, HALF[precision])
            for use in uses:
                use.node.replace_input_with(use.idx, lowered)
    to_half(graph, precision, (), fp32_operators=())


def autocast(plain: Graphs, folder: Path, precision: HalfPrecision) -> Graphs:
    """Convert the FP32 graphs with ModelOpt."""
    from modelopt.onnx.autocast import convert_to_mixed_precision

    folder.mkdir()
    paths = []
    for path in (plain.condition, plain.guided):
        model = convert_to_mixed_precision(str(path), low_precision_type=precision, keep_io_types=True)
        paths.append(folder / path.name)
        onnx.save(onnx.shape_inference.infer_shapes(model), paths[-1])
    condition, guided = paths
    return Graphs(condition, guided)


def judge(
    name: str,
    precision: HalfPrecision,
    policy: str,
    layers: tuple[str, ...],
    graphs: Graphs,
    loaded: LoadedModel,
    spec: GraphSpec,
    wanted: Sequence[Array],
) -> Row:
    """Measure errors and activations, and build an engine of the guided graph with TensorRT-RTX."""
    errors = distances(predictions(graphs, loaded, spec, exact=False), wanted)
    as_it_is = distances(predictions(graphs, loaded, spec, exact=True), wanted) if precision == "fp16" else None
    shares: dict[str, float] = {}
    for number in range(len(TIMES)):
        for node, share in range_shares(graphs.guided, feeds(graphs, loaded, spec, number, exact=False)).items():
            shares[node] = max(share, shares.get(node, 0.0))
    largest = max(shares, key=lambda node: shares[node])
    attentions = half_attentions(ir.load(graphs.guided).graph)
    engine, size, fused, refused = graphs.guided.with_suffix(".engine"), None, None, None
    profile = Profile(1, tuple(level.keep for level in spec.levels))
    try:
        plan = EngineRecipe((profile_shapes(profile, spec, loaded.facts),))
        build_in_child("tensorrt_rtx", graphs.guided, plan, engine, lambda phase, done, steps: None)
        size, fused = round(engine.stat().st_size / 1e6, 1), count_fused_attention(engine)
    except EngineError as error:
        refused = str(error)
    return Row(
        model=name,
        precision=precision,
        policy=policy,
        fp32_layers=layers,
        errors=errors,
        worst=max(errors),
        errors_of_onnxruntime=as_it_is,
        largest=round(shares[largest], 6),
        largest_in=largest,
        engine_mb=size,
        half_attentions=attentions,
        fused_attentions=fused,
        refused=refused,
    )


def distances(found: Sequence[Array], wanted: Sequence[Array]) -> tuple[float, ...]:
    """Return the relative L2 distance at each time."""
    return tuple(round(float(np.linalg.norm(f - w) / np.linalg.norm(w)), 6) for f, w in zip(found, wanted, strict=True))


def predictions(graphs: Graphs, loaded: LoadedModel, spec: GraphSpec, *, exact: bool) -> list[Array]:
    """Return the guided prediction at each of `TIMES`.

    exact: run the graphs without emulation.
    """
    session = open_session(graphs.guided, None if exact else emulated(graphs.guided))
    return [
        session.run(["prediction"], feeds(graphs, loaded, spec, number, exact=exact))[0] for number in range(len(TIMES))
    ]


def feeds(
    graphs: Graphs, loaded: LoadedModel, spec: GraphSpec, number: int, *, exact: bool
) -> dict[str, NDArray[np.generic]]:
    """Return the inputs of the guided graph at one of `TIMES`.

    Noise, classes and kept tokens depend on the time. The modulations are computed by the policy's
    condition graph.
    """
    facts, seeds = loaded.facts, range(IMAGES)
    generator = np.random.default_rng(number)
    x = generator.standard_normal((IMAGES, *facts.latent), dtype=np.float32)
    classes = generator.integers(0, facts.labels.count, IMAGES)
    session = open_session(graphs.condition, None if exact else emulated(graphs.condition))
    (modulations,) = session.run(None, {"t": np.full(IMAGES, TIMES[number], np.float32), "class": classes})
    scalars = {"scale": SCALE, "c_in": 1, "c_skip": 0, "c_out": 1, "a": 1, "b": 0, "e": 0}
    given: dict[str, NDArray[np.generic]] = {name: np.array(value, np.float32) for name, value in scalars.items()}
    for branch, (end, level) in enumerate(zip(("strong", "weak"), spec.levels, strict=True)):
        drawn = [philox.subset(s, facts.tokens, level.keep, step=number, evaluation=0, branch=branch) for s in seeds]
        keep = np.stack(drawn)
        given[f"rows_{end}"] = rows(keep, facts.tokens)
        given[f"restore_{end}"] = restore(keep, facts.tokens, facts.masked)
    return given | {"x": x, "r": x, "modulations": modulations}


if __name__ == "__main__":
    main()
