"""Patterns of a step of DiT-XL/2 as graphs of a few nodes, each in several forms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WIDTH, HEADS, SIZE, TOKENS = 1152, 16, 72, 256
FP32, FP16, INT64 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16), int(TensorProto.INT64)
MICROSOFT = "com.microsoft"
OUTPUT = "y"

Tensor = tuple[str, int, tuple[int, ...]]
"""Name, type and shape."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A model with one output. inputs, output: names, types and shapes."""

    name: str
    model: onnx.ModelProto
    inputs: Sequence[Tensor]
    output: Tensor

    def feeds(self) -> dict[str, NDArray[Any]]:
        """Return random inputs. Row numbers are sorted and differ from one another."""
        rng, kinds = np.random.default_rng(0), {FP32: np.float32, FP16: np.float16}
        given: dict[str, NDArray[Any]] = {}
        for name, kind, shape in self.inputs:
            if kind != INT64:
                given[name] = rng.standard_normal(shape, np.float32).astype(kinds[kind])
                continue
            rows = np.sort(rng.permutation(TOKENS)[: shape[1] if len(shape) == 3 else shape[0]])
            given[name] = np.stack([np.zeros_like(rows), rows], -1)[None] if len(shape) == 3 else rows
        return given


def patterns() -> Iterator[Pattern]:
    """Yield all patterns: attention, scatter, gather, and fc1 with bias and GELU."""
    for tokens in (256, 128):
        yield from _attentions(tokens)
    yield from _branches((256, 128))
    yield _packed_attention((256, 128))
    for kept in (128, 26):
        yield from _scatters_and_gathers(kept)
    yield from _fc1(256 + 128)


def _attentions(tokens: int) -> Iterator[Pattern]:
    inputs, output = [("qkv", FP16, (1, tokens, 3 * WIDTH))], (OUTPUT, FP16, (1, tokens, WIDTH))
    split = _node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3)
    nodes = [split]
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            _node("Reshape", [name, "by_heads"], [f"{name}4"]),
            _node("Transpose", [f"{name}4"], [f"{name}t"], perm=order),
        ]
    nodes += [
        _node("Mul", ["qt", "scale"], ["qs"]),
        _node("MatMul", ["qs", "kt"], ["scores"]),
        _node("Softmax", ["scores"], ["shares"], axis=-1),
        _node("MatMul", ["shares", "vt"], ["o"]),
        _node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
        _node("Reshape", ["ot", "joined"], [OUTPUT]),
    ]
    constants = {
        "by_heads": np.array([1, tokens, HEADS, SIZE]),
        "joined": np.array([1, tokens, WIDTH]),
        "scale": np.array(SIZE**-0.5, np.float16),
    }
    name = f"attention over {tokens}"
    yield _pattern(f"{name}: MatMul, Softmax, MatMul", nodes, inputs, output, constants)
    fused = _node("MultiHeadAttention", ["q", "k", "v"], [OUTPUT], domain=MICROSOFT, num_heads=HEADS)
    yield _pattern(f"{name}: MultiHeadAttention", [split, fused], inputs, output)
    standard = _node("Attention", ["q", "k", "v"], [OUTPUT], q_num_heads=HEADS, kv_num_heads=HEADS)
    yield _pattern(f"{name}: Attention of opset 23", [split, standard], inputs, output, opset=23)


def _branches(counts: tuple[int, int]) -> Iterator[Pattern]:
    """Yield attention of two packed branches: one for each, and one whose bias separates them."""
    total, name = sum(counts), f"attention over {counts[0]} + {counts[1]}"
    inputs, output = [("qkv", FP16, (1, total, 3 * WIDTH))], (OUTPUT, FP16, (1, total, WIDTH))
    ends = {"axis": np.array([1]), "0": np.array([0]), "1": np.array([counts[0]]), "2": np.array([total])}
    nodes = []
    for branch in range(2):
        thirds = [f"{third}{branch}" for third in "qkv"]
        nodes += [
            _node("Slice", ["qkv", f"{branch}", f"{branch + 1}", "axis"], [f"qkv{branch}"]),
            _node("Split", [f"qkv{branch}"], thirds, axis=-1, num_outputs=3),
            _node("MultiHeadAttention", thirds, [f"o{branch}"], domain=MICROSOFT, num_heads=HEADS),
        ]
    joined = _node("Concat", ["o0", "o1"], [OUTPUT], axis=1)
    yield _pattern(f"{name}: MultiHeadAttention for each", [*nodes, joined], inputs, output, ends)
    number = np.repeat(np.arange(2), counts)
    bias = np.where(number[:, None] == number, 0, np.finfo(np.float16).min).astype(np.float16)
    split = _node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3)
    masked = _node("MultiHeadAttention", ["q", "k", "v", "", "", "bias"], [OUTPUT], domain=MICROSOFT, num_heads=HEADS)
    yield _pattern(
        f"{name}: MultiHeadAttention with a bias", [split, masked], inputs, output, {"bias": bias[None, None]}
    )


def _packed_attention(counts: tuple[int, int]) -> Pattern:
    total, longest = sum(counts), max(counts)
    # Places of the tokens in a table of (branches, longest), then the places without a token.
    places = [longest * branch + row for branch, count in enumerate(counts) for row in range(count)]
    empty = [longest * branch + row for branch, count in enumerate(counts) for row in range(count, longest)]
    constants = {
        "offset": np.array(places + empty, np.int32).reshape(len(counts), longest),
        "cumulative": np.cumsum([0, *counts]).astype(np.int32),
    }
    inputs = ["qkv", "", "", "", "offset", "cumulative"]
    return _pattern(
        f"attention over {counts[0]} + {counts[1]}: PackedMultiHeadAttention",
        [_node("PackedMultiHeadAttention", inputs, [OUTPUT], domain=MICROSOFT, num_heads=HEADS)],
        [("qkv", FP16, (total, HEADS, 3, SIZE))],
        (OUTPUT, FP16, (total, WIDTH)),
        constants,
    )


def _scatters_and_gathers(kept: int) -> Iterator[Pattern]:
    tokens, some = ("x", FP32, (1, TOKENS, WIDTH)), ("u", FP32, (1, kept, WIDTH))
    pairs, rows = ("keep", INT64, (1, kept, 2)), ("keep", INT64, (kept,))
    output = (OUTPUT, FP32, (1, TOKENS, WIDTH))
    scatter = _node("ScatterND", ["x", "keep", "u"], [OUTPUT])
    yield _pattern(f"put back {kept}: ScatterND", [scatter], [tokens, some, pairs], output)
    joined = [_node("Concat", ["x", "u"], ["xu"], axis=1), _node("Gather", ["xu", "restore"], [OUTPUT], axis=1)]
    inputs = [tokens, some, ("restore", INT64, (TOKENS,))]
    yield _pattern(f"put back {kept}: Concat, Gather", joined, inputs, output)
    fewer = (OUTPUT, FP32, (1, kept, WIDTH))
    yield _pattern(f"keep {kept}: GatherND", [_node("GatherND", ["x", "keep"], [OUTPUT])], [tokens, pairs], fewer)
    gather = _node("Gather", ["x", "keep"], [OUTPUT], axis=1)
    yield _pattern(f"keep {kept}: Gather", [gather], [tokens, rows], fewer)


def _fc1(rows: int) -> Iterator[Pattern]:
    rng = np.random.default_rng(0)
    constants = {
        "w": (rng.standard_normal((WIDTH, 4 * WIDTH), np.float32) * 0.02).astype(np.float16),
        "b": np.ones(4 * WIDTH, np.float16),
    }
    inputs, output = [("x", FP16, (1, rows, WIDTH))], (OUTPUT, FP16, (1, rows, 4 * WIDTH))
    product = _node("MatMul", ["x", "w"], ["m"])
    plain = [_node("Add", ["m", "b"], ["s"]), _node("Gelu", ["s"], [OUTPUT], approximate="tanh")]
    yield _pattern("fc1: MatMul, Add, Gelu", [product, *plain], inputs, output, constants)
    fused = _node("FastGelu", ["m", "b"], [OUTPUT], domain=MICROSOFT)
    yield _pattern("fc1: MatMul, FastGelu with bias", [product, fused], inputs, output, constants)


_node = helper.make_node


def _pattern(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Tensor],
    output: Tensor,
    constants: dict[str, NDArray[Any]] | None = None,
    opset: int = 20,
) -> Pattern:
    initializers = [numpy_helper.from_array(value, key) for key, value in (constants or {}).items()]
    tensors = [helper.make_tensor_value_info(*tensor) for tensor in inputs]
    graph = helper.make_graph(list(nodes), "pattern", tensors, [helper.make_tensor_value_info(*output)], initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10 if opset < 23 else 11)
    return Pattern(name, model, inputs, output)
