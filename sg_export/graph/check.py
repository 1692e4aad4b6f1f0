"""Checks of a written graph: ONNX's checker, types, and ONNX Runtime compared with PyTorch."""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sg_export.graph.emulate import emulated
from sg_export.graph.module import GraphModule, random_inputs
from sg_export.graph.overflow import first_overflow
from sg_export.graph.products import belongs, weighted_products
from sg_export.graph.spec import GraphSpec, graph_inputs
from sg_export.loading import LoadedModel
from sg_export.options.compile import CompileOptions
from sg_export.options.types import BASES
from sg_export.parity.distances import relative_l2
from sg_runtime.backends.ort import open_session
from sg_runtime.errors import CheckpointError, EngineError, ExportError, MissingExtraError
from sg_runtime.manifest import Precision, Source, TensorFacts


def check_types(path: Path, precision: Precision, fp32_layers: Iterable[str]) -> None:
    """Raise ExportError unless the products with a weight have the requested types.

    Products of the modules `fp32_layers` are expected in FP32, all others in `precision`. The graph
    is read from `path`, and ONNX infers the types of computed values.
    """
    wanted, layers = ir.DataType(BASES[precision].onnx), tuple(fp32_layers)
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))).graph
    for weight, node in weighted_products(graph):
        expected = ir.DataType.FLOAT if belongs(weight, layers) else wanted
        found = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
        if found != {expected}:
            names = ", ".join(sorted(str(dtype) for dtype in found))
            raise ExportError(
                f"graph {path.name}: node {node.name}: expected {expected}, found {names}; please report this with the "
                f"versions that sg-export doctor prints"
            )


def run_onnx(graph: Path, feeds: Mapping[str, NDArray[Any]], content: bytes | None = None) -> list[NDArray[Any]]:
    """Open the graph at `graph`, run it on `feeds`, and return its outputs in order.

    content: a serialized model to run instead, with the weights next to `graph`.
    Raises EngineError if ONNX Runtime cannot open or run the graph, and MissingExtraError if ONNX
    Runtime is not installed.
    """
    session = open_session(graph, content)
    try:
        outputs: list[NDArray[Any]] = session.run(None, dict(feeds))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(f"{graph.name}: ONNX Runtime failed: {error}") from error
    return outputs


MAX_QUANTIZED_ERROR = 0.5
"""The same limit for a quantized graph. Its gates judge its quality, on real inputs."""


def check_graph(path: Path) -> None:
    """Run ONNX's checker and strict shape inference on a file.

    Both run by path, so weights above 2 GB are allowed. Raises ExportError with ONNX's reason.
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


def check_reference(source: Source, subject: str, *outputs: NDArray[Any]) -> None:
    """Raise CheckpointError if a value that PyTorch computed for `subject` is not finite."""
    if not all(np.isfinite(output).all() for output in outputs):
        raise CheckpointError(
            f"{source.file}: expected finite values from the checkpoint in PyTorch, found NaN or infinity for "
            f"{subject}: its weights overflow FP32 before any export; take another checkpoint"
        )


def check_parity(loaded: LoadedModel, spec: GraphSpec, path: Path, options: CompileOptions) -> float | None:
    """Return the relative L2 distance of the graph to PyTorch on one random input.

    Returns None if ONNX Runtime is not installed. Raises CheckpointError if PyTorch's output is not
    finite, and ExportError if the distance is above the limit for the precision.
    """
    inputs = graph_inputs(spec, loaded.facts, options.batch)
    generator = torch.Generator().manual_seed(1)
    values = random_inputs(inputs, loaded.facts, {"B": 2, "S": 2}, generator)
    most = None if options.quantize is None else MAX_QUANTIZED_ERROR
    return _parity(loaded.source, GraphModule(loaded.model, spec, [*values]), values, path, options.precision, most)


def check_part_parity(
    source: Source, module: nn.Module, inputs: Sequence[TensorFacts], path: Path, precision: Precision
) -> float | None:
    """Return the relative L2 distance to PyTorch of the graph of a text encoder or a decoder.

    Ids are random, half of them padding, whose embeddings do not count. Returns None and raises
    errors as `check_parity`.
    """
    generator, values = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for tensor in inputs:
        shape = [int(size) for size in tensor.shape]
        if tensor.name == "ids":
            known = next(part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding))
            values["ids"] = torch.randint(known, shape, generator=generator)
        elif tensor.name == "mask":
            values["mask"] = (torch.arange(shape[1]) <= shape[1] // 2).long()[None]
        else:
            values[tensor.name] = torch.randn(shape, generator=generator)
    counted = values["mask"].bool() if "mask" in values else None
    return _parity(source, module, values, path, precision, counted=counted)


def _parity(
    source: Source,
    module: nn.Module,
    values: Mapping[str, Tensor],
    path: Path,
    precision: Precision,
    most: float | None = None,
    counted: Tensor | None = None,
) -> float | None:
    """Return the distance of the graph at `path` to a module on these values; see `check_parity`.

    most: limit of the distance; None for that of the precision. counted: places of the outputs that
    count, as a mask of their first axes; None for all.
    """
    try:
        feeds = {name: value.numpy() for name, value in values.items()}
        found = run_onnx(path, feeds, None if precision == "fp32" else emulated(path))
    except MissingExtraError:
        return None
    with torch.no_grad():
        outputs = module(*values.values())
    places = ... if counted is None else counted.numpy()
    wanted = [output.numpy()[places] for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
    check_reference(source, path.name, *wanted)
    distance = max(relative_l2(f[places], w) for f, w in zip(found, wanted, strict=True))
    if not math.isfinite(distance) and precision != "fp32" and (operator := first_overflow(path, feeds)) is not None:
        raise ExportError(
            f"graph {path.name}: expected values in the range of {precision}, found larger values from {operator} on: "
            f"build with `{'text_precision' if counted is not None else 'precision'}` bf16 or fp32"
        )
    most = BASES[precision].build_limit if most is None else most
    if not distance <= most:
        raise ExportError(
            f"graph {path.name}: relative L2 distance to PyTorch: expected at most {most:g}, "
            f"found {distance:g}; please report this with the versions that sg-export doctor prints"
        )
    return distance
