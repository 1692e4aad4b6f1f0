"""A guided step of DiT-XL/2, built node by node in several forms for ONNX Runtime's CUDA provider.

Each form is the complete step for one image in FP16, from one latent to the next. The weights are
random and the route is 2-24. PyTorch computes the same step in FP32. The part `forms` compares and
times the forms.

attention  plain: MatMul, Softmax, MatMul for each branch.
           mha: com.microsoft.MultiHeadAttention for each branch.
           packed: com.microsoft.PackedMultiHeadAttention over the packed rows of both branches.
norm       vector: SkipLayerNormalization with the modulation as gamma and beta (one image, one
           class).
           affine: SkipLayerNormalization with gamma 1 and beta 0, then Mul and Add. This form also
           works for several images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.gpu.sessions import Bound

Weights = Mapping[str, NDArray[Any]]
MICROSOFT = "com.microsoft"

WIDTH, DEPTH, HEADS, TOKENS, ROUTE = 1152, 28, 16, 256, (2, 25)
VECTORS = 8
"""Number of modulation vectors per block.

Four for attention and four for the MLP: shift, 1 + scale, gate, and gate × bias of the last matmul.
"""
FORMS = (("packed", "vector"), ("packed", "affine"), ("mha", "vector"), ("plain", "affine"))
KEPT = {"0/0.5": (256, 128), "0.5/0.9": (128, 26)}


class Builder:
    """Builder of the nodes and initializers of one step."""

    def __init__(self, attention: str, norm: str, weights: Weights, depth: int) -> None:
        self.attention_form, self.norm_form, self.weights, self.depth = attention, norm, weights, depth
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def ops(self, kind: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node and return the names of its outputs."""
        names = [f"{kind}_{len(self.nodes)}_{number}" for number in range(outputs)]
        node = helper.make_node(kind, list(inputs), names, f"{kind}_{len(self.nodes)}", domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def contrib(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.op(kind, *inputs, domain=MICROSOFT, **attributes)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def vector(self, block: int, number: int) -> str:
        """Return the name of one modulation vector, (D,)."""
        return self.vectors[block * VECTORS + number]

    def attend(self, qkv: str, block: int, counts: tuple[int, ...]) -> str:
        """Add attention: qkv (R, 3D) without bias → (R, D)."""
        size, rows = WIDTH // HEADS, sum(counts)
        if self.attention_form == "packed":
            longest = max(counts)
            starts = np.cumsum([0, *counts])
            places = [list(range(n)) for n in counts]
            filler = [[longest * b + k for k in range(counts[b], longest)] for b in range(len(counts))]
            valid = [longest * b + place for b, own in enumerate(places) for place in own]
            offsets = np.array(valid + [one for part in filler for one in part], np.int32).reshape(len(counts), longest)
            key = "_".join(map(str, counts))
            query = self.op("Reshape", qkv, self.ints(rows, HEADS, 3, size))
            return self.contrib(
                "PackedMultiHeadAttention", query, "", "", self.weight(f"{block}.qkv.bias"),
                self.constant(f"offsets_{key}", offsets), self.constant(f"starts_{key}", starts.astype(np.int32)),
                num_heads=HEADS,
            )  # fmt: skip
        # Packed attention has columns (heads, 3, size), the other forms (3, heads, size).
        qkv = self.op("Add", qkv, self.weight(f"{block}.qkv.bias"))
        parts = [qkv] if len(counts) == 1 else self.ops("Split", qkv, self.ints(*counts), outputs=len(counts), axis=0)
        done = []
        for count, part in zip(counts, parts, strict=True):
            heads = self.ops("Split", part, outputs=3, axis=-1, num_outputs=3)
            if self.attention_form == "mha":
                q, k, v = (self.op("Reshape", one, self.ints(1, count, WIDTH)) for one in heads)
                out = self.contrib("MultiHeadAttention", q, k, v, num_heads=HEADS)
            else:
                q, k, v = (self.op("Reshape", one, self.ints(1, count, HEADS, size)) for one in heads)
                q, v = (self.op("Transpose", one, perm=[0, 2, 1, 3]) for one in (q, v))
                k = self.op("Transpose", k, perm=[0, 2, 3, 1])
                scale = self.constant("attention_scale", np.array(size**-0.5, np.float16))
                scores = self.op("Softmax", self.op("MatMul", self.op("Mul", q, scale), k), axis=-1)
                out = self.op("Transpose", self.op("MatMul", scores, v), perm=[0, 2, 1, 3])
            done.append(self.op("Reshape", out, self.ints(count, WIDTH)))
        return done[0] if len(done) == 1 else self.op("Concat", *done, axis=0)

    def add_norm(self, x: str, update: str, gate: str, bias: str, shift: str, scale: str) -> tuple[str, str]:
        """Add x + gate * update + bias, its norm and modulation.

        Returns the names of the sum and of the modulated norm.
        """
        gated = self.op("Mul", update, gate)
        one, zero = self.constant("one", np.ones(WIDTH, np.float16)), self.constant("zero", np.zeros(WIDTH, np.float16))
        vector = self.norm_form == "vector"
        gamma, beta = (scale, shift) if vector else (one, zero)
        normed, _, _, total = self.ops(
            "SkipLayerNormalization", x, gated, gamma, beta, bias, outputs=4, domain=MICROSOFT, epsilon=1e-6
        )
        self.nodes[-1].output[1:3] = ["", ""]
        return total, normed if vector else self.op("Add", self.op("Mul", normed, scale), shift)

    def step(self, kept: tuple[int, int]) -> onnx.ModelProto:
        # A Split has equal parts and at most 32 of them. Any other Split copies its sizes from the
        # host in every run.
        names = []
        for block in range(self.depth + 1):
            count = VECTORS if block < self.depth else 2
            names += self.ops("Split", f"vectors.{block}", outputs=count, axis=0, num_outputs=count)
        # Each vector is (1, D). SkipLayerNormalization expects (D,); a Reshape runs no kernel.
        self.vectors = [self.op("Reshape", name, self.ints(WIDTH)) for name in names]
        patches = self.op("Reshape", "x", self.ints(4, 16, 2, 16, 2))
        patches = self.op("Transpose", patches, perm=[1, 3, 0, 2, 4])
        patches = self.op("Cast", self.op("Reshape", patches, self.ints(TOKENS, 16)), to=TensorProto.FLOAT16)
        x = self.op("Add", self.op("MatMul", patches, self.weight("embed")), self.weight("position"))
        ones = self.constant("one", np.ones(WIDTH, np.float16))
        normed = self.op("LayerNormalization", x, ones, axis=-1, epsilon=1e-6)
        normed = self.op("Add", self.op("Mul", normed, self.vector(0, 1)), self.vector(0, 0))
        start, stop = ROUTE if self.depth == DEPTH else (1, self.depth - 1)
        counts: tuple[int, ...] = (TOKENS,)
        for block in range(self.depth):
            if block == start:
                before, counts = (x, normed), kept
                x, normed = self.op("Gather", x, "keep", axis=0), self.op("Gather", normed, "keep", axis=0)
            if block == stop:
                counts = (TOKENS, TOKENS)
                x, normed = (
                    self.op("Gather", self.op("Concat", whole, part, axis=0), "restore", axis=0)
                    for whole, part in zip(before, (x, normed), strict=True)
                )
            y = self.attend(self.op("MatMul", normed, self.weight(f"{block}.qkv")), block, counts)
            y = self.op("MatMul", y, self.weight(f"{block}.proj"))
            v = [self.vector(block, number) for number in range(VECTORS)]
            x, normed = self.add_norm(x, y, v[2], v[3], v[4], v[5])
            hidden = self.op("MatMul", normed, self.weight(f"{block}.fc1"))
            hidden = self.contrib("FastGelu", hidden, self.weight(f"{block}.fc1.bias"))
            y = self.op("MatMul", hidden, self.weight(f"{block}.fc2"))
            last = block == self.depth - 1
            following = [self.vectors[-2], self.vectors[-1]] if last else [self.vector(block + 1, n) for n in (0, 1)]
            x, normed = self.add_norm(x, y, v[6], v[7], *following)
        strong, weak = self.ops("Split", normed, outputs=2, axis=0, num_outputs=2)  # equal numbers of rows
        two = self.constant("scale", np.array(2, np.float16))
        combined = self.op("Add", weak, self.op("Mul", self.op("Sub", strong, weak), two))
        out = self.op("Cast", self.op("MatMul", combined, self.weight("head")), to=TensorProto.FLOAT)
        out = self.op("Reshape", out, self.ints(16, 16, 2, 2, 4))
        out = self.op("Reshape", self.op("Transpose", out, perm=[4, 0, 2, 1, 3]), self.ints(1, 4, 32, 32))
        step = self.constant("step", np.array(-1 / 40, np.float32))
        self.nodes.append(helper.make_node("Add", ["x", self.op("Mul", out, step)], ["next"]))
        rows = sum(kept)
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 32, 32]),
            *(
                helper.make_tensor_value_info(
                    f"vectors.{block}", TensorProto.FLOAT16, [VECTORS if block < self.depth else 2, WIDTH]
                )
                for block in range(self.depth + 1)
            ),
            helper.make_tensor_value_info("keep", TensorProto.INT64, [rows]),
            helper.make_tensor_value_info("restore", TensorProto.INT64, [2 * TOKENS]),
        ]
        outputs = [helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, 4, 32, 32])]
        graph = helper.make_graph(self.nodes, "step", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def random_weights(depth: int) -> Weights:
    """Return random FP16 weights.

    Each tensor has its own memory. The columns of qkv have the order (3, heads, size).
    """
    rng = np.random.default_rng(0)
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "qkv.bias": (3 * WIDTH,), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, 4 * WIDTH),
              "fc1.bias": (4 * WIDTH,), "fc2": (4 * WIDTH, WIDTH)}  # fmt: skip
    first = {name: (rng.standard_normal(shape, np.float32) * 0.03).astype(np.float16) for name, shape in shapes.items()}
    weights = {f"{block}.{name}": np.roll(value, block) for block in range(depth) for name, value in first.items()}
    ends = {"embed": (16, WIDTH), "position": (TOKENS, WIDTH), "head": (WIDTH, 16)}
    return weights | {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in ends.items()}


def packed_columns(weights: Weights) -> Weights:
    """Return the weights of the same network for packed attention.

    The columns of qkv are reordered to (heads, 3, size). The bias of qkv keeps its order.
    """
    size = WIDTH // HEADS

    def packed(value: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(
            value.reshape(WIDTH, 3, HEADS, size).transpose(0, 2, 1, 3).reshape(WIDTH, 3 * WIDTH)
        )

    return {name: packed(value) if name.endswith(".qkv") else value for name, value in weights.items()}


def feeds(kept: tuple[int, int], depth: int) -> Weights:
    """Return the inputs of a step.

    keep: indices of the kept tokens of both branches in the dense rows, one branch after the other.
    restore: indices of every token of both branches in the dense rows followed by the routed rows.
    """
    rng = np.random.default_rng(1)
    parts = [np.sort(rng.permutation(TOKENS)[:count]) for count in kept]
    restore = [np.arange(TOKENS) for _ in kept]
    routed = TOKENS
    for places, part in zip(restore, parts, strict=True):
        places[part] = routed + np.arange(len(part))
        routed += len(part)
    vectors = rng.standard_normal((depth * VECTORS + 2, WIDTH), np.float32) * 0.1
    vectors[[*(b * VECTORS + n for b in range(depth) for n in (1, 5)), -1]] += 1
    x = rng.standard_normal((1, 4, 32, 32), np.float32)
    own = {f"vectors.{b}": vectors[b * VECTORS : (b + 1) * VECTORS].astype(np.float16) for b in range(depth + 1)}
    return {"x": x, **own, "keep": np.concatenate(parts), "restore": np.concatenate(restore)}


def reference(weights: Weights, given: Weights, kept: tuple[int, int], depth: int, device: str) -> Any:
    """Compute the same step in PyTorch in FP32."""
    import torch
    import torch.nn.functional as F

    w = {name: torch.from_numpy(value).to(device).float() for name, value in weights.items()}
    f = {name: torch.from_numpy(value).to(device) for name, value in given.items()}
    v = torch.cat([f[f"vectors.{block}"] for block in range(depth + 1)]).float()

    def normed(x: Any, shift: Any, scale: Any) -> Any:
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * scale + shift

    x = f["x"].reshape(4, 16, 2, 16, 2).permute(1, 3, 0, 2, 4).reshape(TOKENS, 16) @ w["embed"] + w["position"]
    start, stop = ROUTE if depth == DEPTH else (1, depth - 1)
    counts: list[int] = [TOKENS]
    for block in range(depth):
        if block == start:
            before, counts, x = x, list(kept), x[f["keep"]]
        if block == stop:
            counts, x = [TOKENS, TOKENS], torch.cat([before, x])[f["restore"]]
        m = v[block * VECTORS : (block + 1) * VECTORS]
        qkv = normed(x, m[0], m[1]) @ w[f"{block}.qkv"] + w[f"{block}.qkv.bias"]
        out = []
        for part in qkv.split(counts):
            q, k, value = part.reshape(1, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            out.append(F.scaled_dot_product_attention(q, k, value)[0].transpose(0, 1).reshape(-1, WIDTH))
        x = x + torch.cat(out) @ w[f"{block}.proj"] * m[2] + m[3]
        hidden = F.gelu(normed(x, m[4], m[5]) @ w[f"{block}.fc1"] + w[f"{block}.fc1.bias"], approximate="tanh")
        x = x + hidden @ w[f"{block}.fc2"] * m[6] + m[7]
    strong, weak = normed(x, v[-2], v[-1]).chunk(2)
    out = (weak + 2 * (strong - weak)) @ w["head"]
    return f["x"] - out.reshape(16, 16, 2, 2, 4).permute(4, 0, 2, 1, 3).reshape(1, 4, 32, 32) / 40


def bound(
    attention: str, norm: str, kept: tuple[int, int], weights: Weights, given: Weights, depth: int
) -> tuple[Bound, Any]:
    """Return a step in a session on the GPU, and the tensor that it writes the next latent to.

    weights: those of `random_weights`. given: those of `feeds`.
    """
    import torch

    own = packed_columns(weights) if attention == "packed" else weights
    model = Builder(attention, norm, own, depth).step(kept)
    target = torch.empty(1, 4, 32, 32, device="cuda")
    inputs = {name: torch.from_numpy(value).cuda() for name, value in given.items()}
    return Bound(model, inputs, "next", target), target
