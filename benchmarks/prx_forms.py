r"""Say what a guided step of PRX spends its time on, and compare it with other forms of its graph.

    python -m benchmarks.prx_forms --output benchmarks/results/prx_forms.json

The network is that of `benchmarks.prx_speed`, with one image and γ 0/0.5, in FP32 in ONNX Runtime
on one thread. Times are processor times of that thread, which other work on the machine hardly
changes. All forms run in turn in every round. The profile has the shortest time of each node.

bias             without the bias that masks padding: what exact masks cost; the result is another
gate and up      one product for both, and a split of its result
head-major       queries, keys and values as (B, heads, tokens, size) from their product on
unfused          without ONNX Runtime's fusion of a residual sum with a LayerNormalization
CUDA             the graph for ONNX Runtime's CUDA provider: MultiHeadAttention, and modulations as
                 scale and bias of LayerNormalization
RotaryEmbedding  ONNX Runtime's operator in place of five nodes; its positions are arbitrary, so its
                 time alone is of use
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.prx_models import SMALL, write_folder
from sg_export import load_model
from sg_export.graph.attention import lower_attention
from sg_export.graph.cuda import MICROSOFT, lower_for_cuda
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.models.branches import Branches, join
from sg_export.models.dit import modulate
from sg_export.models.prx import PRX, Attention, Block
from sg_export.models.rope import rotate

BATCH = 1
CLOSE = 1e-5
"""Bound on the relative L2 distance between exact forms, whose sums have another order."""

PROFILED = 20
"""Number of runs of the profile."""


@dataclass(frozen=True, slots=True)
class Form:
    """One form of the graph.

    patches: methods of the network that are replaced while it is traced.
    lower: pass that brings the traced graph to its form.
    change: change of the network before it is traced.
    disabled: optimizers that ONNX Runtime leaves out.
    exact: whether the form computes the same as the graph as built.
    """

    patches: Mapping[tuple[type, str], Callable[..., Any]]
    lower: Callable[[ir.Graph], None] = lower_attention
    change: Callable[[PRX], None] = lambda network: None
    disabled: tuple[str, ...] = ()
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """Time of a form.

    milliseconds: median processor time of a step.
    ratio: median over the rounds of its time / that of the graph as built.
    quartiles: lower and upper quartile of the ratio.
    distance: relative L2 distance of its prediction to that of the graph as built.
    """

    form: str
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]
    distance: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(SMALL, Path(scratch) / "prx")
        paths = {name: export(folder, form, Path(scratch) / name) for name, form in FORMS.items()}
        shares = profile(paths["as built"], Path(scratch))
        results = compare(paths, options.rounds)
    for name, share in shares.items():
        print(f"{share:6.1%}  {name}")
    for result in results:
        print(f"{result.form:16} {result.milliseconds:7.1f} ms {result.ratio:.3f} {result.quartiles}")
    if options.output:
        content = {
            "machine": machine("numpy", "torch", "onnxruntime"),
            "setup": {"batch": BATCH, "threads": 1, "rounds": options.rounds, "pair": "0/0.5"},
            "share_of_the_step": {name: round(share, 4) for name, share in shares.items()},
            "forms": [asdict(result) for result in results],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def export(folder: Path, form: Form, output: Path) -> Path:
    """Write the guided graph in one form and return its file."""
    loaded = load_model(folder, overrides=SMALL.overrides)
    assert isinstance(loaded.model.network, PRX)
    form.change(loaded.model.network)
    spec = GraphSpec("guided", (loaded.level(0.0), loaded.level(0.5)))
    with ExitStack() as patched:
        for (owner, name), method in form.patches.items():
            patched.enter_context(mock.patch.object(owner, name, method))
        models = trace(loaded.model, [spec], loaded.facts, BATCH, DEFAULT_OPSET, lower=form.lower)
    output.mkdir()
    (path,) = write_graphs(models, output, "weights.bin")
    return path


def session(path: Path, disabled: tuple[str, ...] = (), profile: Path | None = None) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(
        str(path), settings, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def feeds(opened: onnxruntime.InferenceSession) -> dict[str, NDArray[Any]]:
    """Return random inputs. The first tokens are kept."""
    draw, found = np.random.default_rng(0), {}
    for node in opened.get_inputs():
        if "int64" in node.type:
            found[node.name] = np.tile(np.arange(node.shape[1]), (BATCH, 1))
        else:
            found[node.name] = np.asarray(draw.standard_normal(node.shape) / 2, np.float32)
    return found


def profile(path: Path, scratch: Path) -> dict[str, float]:
    """Return the share of the time of a run by kind of work, the largest first."""
    opened = session(path, profile=scratch / "profile")
    given = feeds(opened)
    for _ in range(PROFILED):
        opened.run(None, given)
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(opened.end_profiling()).read_bytes()):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            shapes = [next(iter(shape.values())) for shape in event["args"]["input_type_shape"]]
            operator = event["args"]["op_name"]
            if operator in ("MatMul", "FusedMatMul"):
                operator = "products with weights" if len(shapes[0]) == 3 else "products of attention"
            nodes[operator, event["name"]].append(event["dur"])
    times: dict[str, float] = defaultdict(float)
    for (operator, _), series in nodes.items():
        times[operator] += min(series)
    total = sum(times.values())
    return {name: own / total for name, own in sorted(times.items(), key=lambda item: -item[1])}


def compare(paths: Mapping[str, Path], rounds: int) -> list[Result]:
    """Time all forms in turn. Raises SystemExit if an exact form computes something else."""
    opened = {name: session(path, FORMS[name].disabled) for name, path in paths.items()}
    given = {name: feeds(own) for name, own in opened.items()}
    found = {name: own.run(["prediction"], given[name])[0] for name, own in opened.items()}
    times: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(rounds):
        for name, own in opened.items():
            began = time.thread_time()
            own.run(None, given[name])
            times[name].append(time.thread_time() - began)
    results = []
    wanted = found["as built"]
    for name, series in times.items():
        ratios = [own / usual for own, usual in zip(series, times["as built"], strict=True)]
        low, middle, high = (round(value, 3) for value in statistics.quantiles(ratios, n=4))
        distance = float(np.linalg.norm(found[name] - wanted) / np.linalg.norm(wanted))
        if FORMS[name].exact and distance > CLOSE:
            raise SystemExit(f"{name}: expected the same prediction within {CLOSE:g}, found {distance:.1e}")
        milliseconds = round(statistics.median(series) * 1e3, 1)
        results.append(Result(name, milliseconds, middle, (low, high), float(f"{distance:.1e}")))
    return results


# The forms


def head_major(self: Attention, x: Tensor, branches: Branches, rows: Tensor) -> Tensor:
    """Attend as `Attention.forward` does, with heads before tokens from the first product on."""
    packed: Tensor = self.img_qkv_proj(x)
    query, key, value = packed.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    turned = [  # with one image, heads can take the place of images
        rotate(norm(part).flatten(0, 1)[:, :, None], rows)[:, :, 0].reshape(part.shape)
        for norm, part in ((self.norm_q, query), (self.norm_k, key))
    ]
    outputs, start = [], 0
    for branch in branches:
        own = slice(start, start := start + branch.count)
        q, k, v = turned[0][:, :, own], turned[1][:, :, own], value[:, :, own]
        k, v = (
            torch.cat([self._by_head(branch.held[name]).transpose(1, 2), part], dim=2)
            for name, part in (("text_keys", k), ("text_values", v))
        )
        bias = F.pad(branch.held["text_bias"], (0, branch.count))[:, None, None]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
    result: Tensor = self.to_out[0](join(outputs))
    return result


def unmasked(self: Attention, held: Mapping[str, Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend as `Attention._attend` does, also to padding."""
    keys = torch.cat([held["text_keys"], key], dim=1)
    values = torch.cat([held["text_values"], value], dim=1)
    q, k, v = (self._by_head(tokens).transpose(1, 2) for tokens in (query, keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def joined(network: PRX) -> None:
    """Give every block one linear map for gate and up projections, in place of two."""
    for block in network.blocks:
        assert isinstance(block, Block)
        both = torch.cat([block.gate_proj.weight, block.up_proj.weight])
        block.gate_proj = nn.Linear(both.shape[1], both.shape[0], bias=False)
        block.gate_proj.weight = nn.Parameter(both, requires_grad=False)
        del block.up_proj


def joined_forward(self: Block, x: Tensor, branches: Branches, rows: Tensor) -> Tensor:
    """Run a block that `joined` changed."""
    shift1, scale1, gate1, shift2, scale2, gate2 = branches.vectors(6)
    y = self.attention(branches.each(modulate, self.img_pre_norm(x), shift1, scale1), branches, rows)
    x = x + branches.each(torch.mul, y, gate1)
    gate, up = self.gate_proj(branches.each(modulate, self.post_attention_layernorm(x), shift2, scale2)).chunk(
        2, dim=-1
    )
    y = self.down_proj(F.gelu(gate, approximate="tanh") * up)
    return x + branches.each(torch.mul, y, gate2)


def lower_rotations(graph: ir.Graph) -> None:
    """Replace each rotation by ONNX Runtime's operator, with the positions 0 to R - 1."""
    lower_attention(graph)
    constants = {}
    half, heads = SMALL.config.width // SMALL.config.heads // 2, SMALL.config.heads
    table = np.random.default_rng(0).random((2 * SMALL.config.tokens, half), dtype=np.float32)
    arrays: dict[str, NDArray[Any]] = {
        "rotations": table,
        "first": np.zeros(1, np.int64),
        "flat": np.array([0, 0, SMALL.config.width]),
        "by head": np.array([0, 0, heads, 2 * half]),
    }
    for name, array in arrays.items():
        tensor, kind = ir.tensor(array, name=name), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        constants[name] = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        graph.register_initializer(constants[name])
    for swap in [node for node in graph if node.op_type == "Concat"]:
        split = swap.inputs[0].producer() if swap.inputs[0] is not None else None
        if split is None or split.op_type != "Split" or list(swap.inputs) != list(split.outputs)[::-1]:
            continue
        pairs = split.inputs[0].producer() if split.inputs[0] is not None else None
        assert pairs is not None
        x = pairs.inputs[0]
        node = swap
        for _ in ("Reshape", "Mul", "Add"):
            ((node, _),) = node.outputs[0].uses()
        flat = ir.node("Reshape", [x, constants["flat"]])
        rotations = [constants[name] for name in ("first", "rotations", "rotations")]
        turned = ir.node(
            "RotaryEmbedding",
            [flat.outputs[0], *rotations],
            {"interleaved": 1, "num_heads": heads},
            domain=MICROSOFT,
        )
        back = ir.node("Reshape", [turned.outputs[0], constants["by head"]])
        graph.insert_before(node, [flat, turned, back])
        back.outputs[0].shape, back.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(back.outputs[0])
    graph.opset_imports[MICROSOFT] = 1


FORMS = {
    "as built": Form({}),
    "bias": Form({(Attention, "_attend"): unmasked}, exact=False),
    "gate and up": Form({(Block, "forward"): joined_forward}, change=joined),
    "head-major": Form({(Attention, "forward"): head_major}),
    "unfused": Form({}, disabled=("SkipLayerNormFusion",)),
    "CUDA": Form({}, functools.partial(lower_for_cuda, precision="fp32")),
    "RotaryEmbedding": Form({}, lower_rotations, exact=False),
}

if __name__ == "__main__":
    main()
