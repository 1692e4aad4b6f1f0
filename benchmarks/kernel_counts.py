"""Count the CUDA kernels of a guided step of DiT-XL/2 on ONNX Runtime, without a GPU.

    python -m benchmarks.kernel_counts --output benchmarks/results/kernel_counts.json

`KERNELS` says for every operator how many launches its kernel makes, for which types it exists in
onnxruntime-gpu 1.31.1, and which file of ONNX Runtime says so. The script traces the graph of
DiT-XL/2 on PyTorch's meta device, in the generic form and in the form for CUDA, and adds up the
launches of the graphs as they are emitted. A node without a kernel is an error. Copies and memsets
on the device count as launches.

ONNX Runtime's optimizers change a graph when it is opened. They replace MatMul and Add by Gemm,
which launches as many kernels, and the scale of attention in the generic form by FusedMatMul, which
saves one kernel per attention. A profile on a GPU decides in the end.

The types of the kernels are those of the kernel classes in the released binary (names of their
type information in libonnxruntime_providers_cuda.so). Paths are those of ONNX Runtime's sources. A
line number is that of release 1.31.1 (commit 6af1a93). It is where the source prepares or checks
the launch, and comes from the binary, which stores file and line of each such call. Other rows have
no such call. Their launches, and the conditions of MultiHeadAttention, were read in other commits.
The launches of MultiHeadAttention, Concat, Gather, FastGelu and LayerNormalization were also
profiled on an H100 (benchmarks/results/gpu_h100.json, `micro_one` and `xl`).
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from sg_export.graph.attention import lower_attention
from sg_export.graph.cuda import MOST_OUTPUTS, lower_for_cuda
from sg_export.graph.half import fp32_layers, to_half
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import Labels, Level, ModelFacts, OnnxTarget, Precision, Route

HALVES = ("FLOAT16", "BFLOAT16")
FLOATS = ("FLOAT", *HALVES)
DATA = (*FLOATS, "INT64", "BOOL")
PROCESSORS = 132
"""Multiprocessors of the GPU that the launches are counted for, an H100."""

_CUDA, _CONTRIB = "onnxruntime/core/providers/cuda", "onnxruntime/contrib_ops/cuda/bert"

Launches = int | Callable[[ir.Node], int]


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel of an operator in ONNX Runtime's CUDA provider.

    types: types of its first input.
    launches: number of launches, or a function of the node.
    source: file in ONNX Runtime's sources that registers and launches it.
    """

    types: tuple[str, ...]
    launches: Launches
    source: str


def _equal_parts(node: ir.Node) -> int:
    """Launches of a Split: equal parts, at most 32, go by value."""
    widths = {str(output.shape) for output in node.outputs}
    return 1 if len(widths) == 1 and len(node.outputs) <= MOST_OUTPUTS else 5  # four copies of sizes


def _joined(node: ir.Node) -> int:
    return 1 if len(node.inputs) <= MOST_OUTPUTS else 2  # a copy of the addresses


def _attention(node: ir.Node) -> int:
    """Launches of a MultiHeadAttention with three inputs (B, tokens, D).

    In half precision without a bias: flash attention, one kernel, and a second one that combines
    parts if the keys are split. In FP16 and FP32 with a bias, and in FP32 from 256 queries or keys
    on: the memory-efficient kernel. Otherwise: four transposes, two products and a softmax. A
    symbolic batch counts as one image, which has the most launches.
    """
    query, key = node.inputs[:2]
    assert query is not None
    assert key is not None
    assert query.shape is not None
    assert key.shape is not None
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    kind, (_, queries, width), keys = str(query.dtype), query.shape, key.shape[1]
    assert isinstance(queries, int)
    assert isinstance(keys, int)
    assert isinstance(width, int)
    if kind in HALVES and bias is None:
        heads = node.attributes["num_heads"].as_int()
        return 1 + (_parts_of_keys(_images(query.shape[0]), queries, keys, heads, width // heads) > 1)
    multiple = 16 if kind == "FLOAT" else 8
    long = kind == "FLOAT16" or (kind == "FLOAT" and max(queries, keys) >= 256)
    return 1 if long and (bias is None or queries % multiple == 0) else 7


def _images(batch: int | ir.SymbolicDim) -> int:
    """Return the smallest size of a batch dimension, as 2 of "2*B"."""
    first = str(batch).partition("*")[0]
    return int(first) if first.isdecimal() else 1


def _parts_of_keys(images: int, queries: int, keys: int, heads: int, size: int) -> int:
    """Return the number of parts that flash attention computes the keys in, on `PROCESSORS`.

    If the blocks of 64 queries are fewer than 0.8 of the processors, the keys are cut into the
    smallest number of parts whose use of the processors is at least 0.85 of the best.
    """
    blocks = images * heads * math.ceil(queries / 64)
    most = math.ceil(keys / (256 if size <= 64 else 128 if size <= 128 else 64))
    if blocks >= 0.8 * PROCESSORS:
        return 1
    parts = [n for n in range(1, most + 1) if n == 1 or math.ceil(most / n) != math.ceil(most / (n - 1))]
    waves = {n: blocks * n / PROCESSORS for n in parts}
    use = {n: wave / math.ceil(wave) for n, wave in waves.items()}
    return next(n for n in parts if use[n] >= 0.85 * max(use.values()))


KERNELS = {
    "Add": Kernel((*FLOATS, "INT64"), 1, f"{_CUDA}/math/binary_elementwise_ops.cc: Add<T>::ComputeInternal"),
    "Sub": Kernel((*FLOATS, "INT64"), 1, f"{_CUDA}/math/binary_elementwise_ops.cc: Sub<T>::ComputeInternal"),
    "Mul": Kernel((*FLOATS, "INT64"), 1, f"{_CUDA}/math/binary_elementwise_ops.cc: Mul<T>::ComputeInternal"),
    "Cast": Kernel(DATA, 1, f"{_CUDA}/tensor/cast_op.cc: Cast<SrcT>::ComputeInternal"),
    "Concat": Kernel(DATA, _joined, f"{_CUDA}/tensor/concat.cc: Concat::ComputeInternal"),
    "Cos": Kernel(FLOATS, 1, f"{_CUDA}/math/unary_elementwise_ops.cc: Cos<T>::ComputeInternal"),
    "Sin": Kernel(FLOATS, 1, f"{_CUDA}/math/unary_elementwise_ops.cc: Sin<T>::ComputeInternal"),
    "Sigmoid": Kernel(FLOATS, 1, f"{_CUDA}/activation/activations.cc: Sigmoid<T>::ComputeInternal"),
    "Div": Kernel(("FLOAT", "FLOAT16"), 1, f"{_CUDA}/math/binary_elementwise_ops.cc: Div<T>::ComputeInternal"),
    "Equal": Kernel(("INT64",), 1, f"{_CUDA}/math/binary_elementwise_ops.cc: Equal<T>::ComputeInternal"),
    "Expand": Kernel(DATA, 1, f"{_CUDA}/tensor/expand.cc: Expand::ComputeInternal"),
    "FastGelu": Kernel(FLOATS, 1, f"{_CUDA}/tensor/gelu_approximate_impl.cu:72, 83, 107 or 121: LaunchFastGeluKernel"),
    "Gather": Kernel(DATA, 1, f"{_CUDA}/tensor/gather.cc: Gather::ComputeInternal"),
    "Gelu": Kernel(FLOATS, 1, f"{_CUDA}/tensor/gelu_impl.cu:34: LaunchGeluKernel"),
    "Gemm": Kernel(FLOATS, 2, f"{_CUDA}/math/gemm.cc: Gemm<T>::ComputeInternal, the bias and the product"),
    "LayerNormalization": Kernel(FLOATS, 1, f"{_CUDA}/nn/layer_norm_impl.cu: HostApplyLayerNorm"),
    "MatMul": Kernel(FLOATS, 1, f"{_CUDA}/math/matmul.cc: MatMul<T>::ComputeInternal"),
    "Mod": Kernel(("INT64",), 1, f"{_CUDA}/math/binary_elementwise_ops.cc: Mod::ComputeInternal"),
    "MultiHeadAttention": Kernel(
        FLOATS,
        _attention,
        f"{_CONTRIB}/multihead_attention.cc: ComputeInternal; flash_attention/flash_fwd_launch_template.h:82, or 121 "
        f"with parts of the keys; cutlass_fmha/fmha_launch_template.h:258",
    ),
    "Pad": Kernel(("FLOAT", "FLOAT16"), 1, f"{_CUDA}/tensor/pad.cc: Pad<T>::ComputeInternal"),
    "Pow": Kernel(("FLOAT", "FLOAT16"), 1, f"{_CUDA}/math/binary_elementwise_ops.cc: Pow::ComputeInternal"),
    "ReduceMean": Kernel(
        ("FLOAT", "FLOAT16"), 1, f"{_CUDA}/reduction/reduction_ops.cc: ReduceMean<T>::ComputeInternal"
    ),
    "Reshape": Kernel(DATA, 0, f"{_CUDA}/tensor/reshape.cc: registered with Alias(0, 0)"),
    "SkipLayerNormalization": Kernel(FLOATS, 1, f"{_CONTRIB}/skip_layer_norm.cc: LaunchSkipLayerNormKernel"),
    "Slice": Kernel(DATA, 1, f"{_CUDA}/tensor/slice.cc: Slice<dynamic>::ComputeInternal"),
    "Softmax": Kernel(
        FLOATS,
        1,
        f"{_CUDA}/math/softmax_impl.cu:95 or 134",
    ),
    "Split": Kernel(DATA, _equal_parts, f"{_CUDA}/tensor/split.cc: SplitKernel::ComputeInternal"),
    "Sqrt": Kernel(("FLOAT", "FLOAT16"), 1, f"{_CUDA}/math/unary_elementwise_ops.cc: Sqrt<T>::ComputeInternal"),
    "Tile": Kernel(DATA, 1, f"{_CUDA}/tensor/tile.cc: Tile::ComputeInternal"),
    "Transpose": Kernel(DATA, 1, f"{_CUDA}/tensor/transpose.cc: Transpose::DoTranspose"),
    "Unsqueeze": Kernel(DATA, 0, f"{_CUDA}/tensor/unsqueeze.cc: registered with Alias(0, 0)"),
}
"""The kernels of all operators that a graph may have, by operator."""


def launches(graph: ir.Graph) -> Counter[str]:
    """Return the number of launches of each operator of a graph.

    Nodes that read initializers alone count as none: ONNX Runtime computes them when it opens the
    graph. Raises ValueError for a node whose operator or type has no kernel.
    """
    found: Counter[str] = Counter()
    for node in graph:
        kernel = KERNELS.get(node.op_type)
        first = next((value for value in node.inputs if value is not None), None)
        kind = "none" if first is None else str(first.dtype)
        if kernel is None or kind not in kernel.types:
            raise ValueError(
                f"{graph.name}: node {node.name}: expected an operator in KERNELS, found {node.op_type} of {kind}"
            )
        if not all(value is None or value.is_initializer() for value in node.inputs):
            found[node.op_type] += kernel.launches if isinstance(kernel.launches, int) else kernel.launches(node)
    return found


def xl_step(target: OnnxTarget, precision: Precision, batch: int | None) -> ir.Graph:
    """Return the guided graph of DiT-XL/2 at sparsities 0 and 0.5, without weights."""
    with torch.device("meta"):
        network = DiT(DiTConfig(32, 2, 4, 1152, 28, 16, 4608, 1000))
    model = SparseModel(network, Route(2, 24))
    facts = ModelFacts(
        family="tread",
        prediction="flow",
        space="latent",
        latent=(4, 32, 32),
        pixels_per_latent=None,
        patch=2,
        tokens=256,
        width=1152,
        depth=28,
        heads=16,
        conditions=Labels(1000, None),
        held=network.held,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        route=model.route,
        ends=network.ends,
        masked=False,
    )
    strong, weak = Level(0.0, 256), Level(0.5, 128)
    cuda = target == "onnxruntime-cuda"
    lower = partial(lower_for_cuda, precision=precision) if cuda else lower_attention
    (traced,) = trace(model, [GraphSpec("guided", (strong, weak))], facts, batch, 20, lower=lower)
    if precision != "fp32":
        layers = fp32_layers(model, precision)
        to_half(traced.graph, precision, layers, tokens_in_half=cuda and precision == "fp16")
    return traced.graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    cuda: list[tuple[OnnxTarget, Precision]] = [("onnxruntime-cuda", kind) for kind in ("fp16", "bf16", "fp32")]
    forms = [(*form, batch) for form in (("onnxruntime", "fp16"), *cuda) for batch in (1, None)]
    for target, precision, batch in forms:
        counts = launches(xl_step(target, precision, batch))
        rows.append(
            {
                "target": target,
                "precision": precision,
                "batch": batch,
                "launches": counts.total(),
                "by_operator": {operator: count for operator, count in counts.most_common() if count},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    table = {operator: {"types": [*kernel.types], "source": kernel.source} for operator, kernel in KERNELS.items()}
    if options.output:
        content = {
            "model": "guided step of DiT-XL/2, route 2-24, sparsities 0 and 0.5",
            "counts": rows,
            "kernels": table,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
