"""Costs counted from a graph, compared with closed forms and with published figures of SiT-XL/2.

The closed forms give the costs of a DiT from its shape.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sg_export.cost.count import count_cost
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import Cost, Labels, Level, Manifest, ModelFacts, Route

D, N, M, C, PATCH, DEPTH = 32, 16, 128, 2, 2, 3
EMBED_AND_HEAD = 2 * N * D * C * PATCH**2
BLOCK = 12 * D**2
"""Multiply-adds of a block's linear layers for one token: qkv 3 D², proj 1 D², the MLP 8 D²."""


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


def cost(manifest: Manifest, name: str) -> Cost:
    (found,) = (graph.cost for graph in manifest.graphs if graph.name == name)
    return found


def test_count_cost_of_dense_is_the_closed_form(manifest: Manifest) -> None:
    found = cost(manifest, "dense")
    assert found.linear_macs == DEPTH * BLOCK * N + EMBED_AND_HEAD
    assert found.attention_macs == DEPTH * 2 * N**2 * D


@pytest.mark.parametrize("keep", [12, 8])
def test_count_cost_of_sparse_has_kept_tokens_in_the_route(keep: int, manifest: Manifest) -> None:
    found = cost(manifest, f"sparse-{keep}")
    assert found.linear_macs == BLOCK * (2 * N + keep) + EMBED_AND_HEAD
    assert found.attention_macs == 2 * D * (2 * N**2 + keep**2)


@pytest.mark.parametrize(("strong", "weak"), [(16, 8), (12, 8)])
def test_count_cost_of_guided_has_prefix_and_head_once(strong: int, weak: int, manifest: Manifest) -> None:
    found = cost(manifest, f"guided-{strong}-{weak}")
    assert found.linear_macs == BLOCK * (N + strong + weak + 2 * N) + EMBED_AND_HEAD
    assert found.attention_macs == 2 * D * (N**2 + strong**2 + weak**2 + 2 * N**2)


def test_count_cost_of_guided_without_shared_class_has_the_head_once(tiny_cfg_sg_bundle: Path) -> None:
    found = cost(Bundle.open(tiny_cfg_sg_bundle).manifest, "guided-12-8-null")
    assert found.linear_macs == BLOCK * (2 * N + 12 + 8 + 2 * N) + EMBED_AND_HEAD
    assert found.attention_macs == 2 * D * (2 * N**2 + 12**2 + 8**2 + 2 * N**2)


def test_count_cost_of_condition_is_embedder_and_adaln(manifest: Manifest) -> None:
    found = cost(manifest, "condition")
    assert found.linear_macs == 256 * D + D**2 + DEPTH * 6 * D**2 + 2 * D**2
    assert found.attention_macs == 0


def test_count_cost_weights_are_those_of_the_checkpoint(manifest: Manifest) -> None:
    adaln = DEPTH * (6 * D * D + 6 * D) + 2 * D * D + 2 * D
    condition = 256 * D + D + D * D + D + 6 * D + adaln
    step = manifest.model.parameters - condition
    # Besides the checkpoint's tensors, a graph reads small constants: frequencies, unit scales,
    # shapes, slice bounds.
    assert 0 < cost(manifest, "condition").weight_bytes - 4 * condition < 1024
    for graph in manifest.graphs:
        if graph.kind != "condition":
            # This includes guided graphs: no weight is read once per branch.
            assert 0 < graph.cost.weight_bytes - 4 * step < 4096, graph.file


def parse(text: str) -> ir.Graph:
    """Return the graph of `text`, with its input w turned into an initializer."""
    graph = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {text}').graph
    weight = graph.inputs.pop()
    assert weight.shape is not None
    weight.const_value = ir.tensor(np.zeros(weight.shape.numpy(), np.float32), name=weight.name)
    graph.register_initializer(weight)
    return graph


# The last column is the number of floats of x and y for one image.
@pytest.mark.parametrize(
    ("text", "linear", "floats"),
    [
        ("(float[N, 3] x, float[3, 5] w) => (float[N, 5] y) { y = MatMul(x, w) }", 15, 8),
        ("(float[4, 3] x, float[3, 5] w) => (float[4, 5] y) { y = MatMul(x, w) }", 15, 8),
        ("(float[N, 3] x, float[3, 5] w) => (float[N, 5] y) { y = Gemm(x, w) }", 15, 8),
        ("(float[N, 3] x, float[5, 3] w) => (float[N, 5] y) { y = Gemm<transB=1>(x, w) }", 15, 8),
        ("(float[N, 3] x, float[3, 5] w) => (float[N, 5] y) { y = Gemm<transB=0>(x, w) }", 15, 8),
        ("(float[2, 7, 3] x, float[3, 5] w) => (float[2, 7, 5] y) { y = MatMul(x, w) }", 7 * 15, 7 * 8),
        (
            "(float[N, 2, 8, 8] x, float[6, 2, 2, 2] w) => (float[N, 6, 4, 4] y) { y = Conv<strides=[2, 2]>(x, w) }",
            6 * 16 * 8,
            2 * 64 + 6 * 16,
        ),
        ("(float[N, 3] x, float[3] w) => (float[N, 3] y) { y = Mul(x, w) }", 0, 6),
    ],
)
def test_count_cost_of_one_node_is_for_one_image(text: str, linear: int, floats: int) -> None:
    graph = parse(text)
    assert count_cost(graph) == Cost(linear, 0, graph.initializers["w"].const_value.nbytes, 4 * floats)  # type: ignore[union-attr]


def test_count_cost_reads_a_weight_for_every_node_that_takes_it() -> None:
    graph = parse("""(float[N, 3] x, float[3, 3] w) => (float[N, 3] z) <float[N, 3] y> {
        y = MatMul(x, w)
        z = MatMul(y, w)
    }""")
    assert count_cost(graph) == Cost(18, 0, 2 * 36, 2 * 12)


# Bytes of one image, by hand: x 16, k 24 (int64), a 64, b 64, c 16, d 16, y 12. Live, by node:
#     x k a | x k a b | x k b c | x k c d | k d y
# a is not needed after b, b not after c, c and x not after d. The maximum is x k a b.
LIVENESS = """(float[N, 4] x, int64[N, 3] k, float[4, 16] w) => (float[N, 3] y)
    <float[N, 16] a, float[N, 16] b, float[N, 4] c, float[N, 4] d>
{
    a = MatMul(x, w)
    b = Relu(a)
    c = Gemm<transB=1>(b, w)
    d = Add(c, x)
    y = GatherElements<axis=1>(d, k)
}"""


@pytest.mark.parametrize("batch", ["N", "1", "3"])
def test_count_cost_activations_are_what_lives_at_once(batch: str) -> None:
    assert count_cost(parse(LIVENESS.replace("N", batch))).activation_bytes == 16 + 24 + 64 + 64


@pytest.mark.parametrize(
    ("outputs", "body", "peak"),
    [
        # y 16 and b 16, plus a 16, which is an output.
        ("float[N, 4] y, float[N, 4] a", "a = MatMul(x, w) b = Relu(a) y = Relu(b)", 48),
        # a is freed once b exists.
        ("float[N, 4] y", "a = MatMul(x, w) b = Relu(a) y = Relu(b)", 32),
        # A value that nothing reads is freed at once: first a 16 and x 16, then x 16 and y 16.
        ("float[N, 4] y", "a = MatMul(x, w) y = Relu(x)", 32),
    ],
)
def test_count_cost_activations_of_outputs_stay(outputs: str, body: str, peak: int) -> None:
    between = ", ".join(f"float[N, 4] {name}" for name in "ab" if f"{name} =" in body and f"] {name}" not in outputs)
    graph = parse(f"(float[N, 4] x, float[4, 4] w) => ({outputs}) <{between}> {{ {body} }}")
    assert count_cost(graph).activation_bytes == peak


def test_count_cost_activations_of_inputs_that_nothing_reads_stay() -> None:
    graph = parse("(float[N, 4] x, float[N, 100] r, float[4, 4] w) => (float[N, 4] y) { y = MatMul(x, w) }")
    assert count_cost(graph).activation_bytes == 16 + 400 + 16


XL_WIDTH, XL_TOKENS, XL_ROUTED, XL_PATCH_VALUES = 1152, 256, 23, 4 * 2**2
GIGA = 1e9


XL = DiTConfig(image_size=32, patch=2, channels=4, width=1152, depth=28, heads=16, mlp_width=4608, num_classes=1000)


@pytest.fixture(scope="module")
def xl() -> dict[str, Cost]:
    """Costs of the graphs of SiT-XL/2 for one image, with route 2 to 24 as in arXiv 2601.01608.

    The network is on PyTorch's meta device: no weight is allocated.
    """
    with torch.device("meta"):
        network = DiT(XL)
    route = Route(2, 24)
    facts = ModelFacts(
        family="tread",
        prediction="flow",
        space="latent",
        latent=(XL.channels, XL.image_size, XL.image_size),
        pixels_per_latent=None,
        patch=XL.patch,
        tokens=XL.tokens,
        width=XL.width,
        depth=XL.depth,
        heads=XL.heads,
        conditions=Labels(XL.num_classes, None),
        held=network.held,
        parameters=sum(tensor.numel() for tensor in network.state_dict().values()),
        route=route,
        ends=(),
        masked=False,
    )
    model = SparseModel(network, route).eval().requires_grad_(False)
    kept = {"condition": (), "sparse": (128,), "guided": (256, 128)}
    specs = [
        GraphSpec(kind, tuple(Level(1 - count / XL.tokens, count) for count in counts))  # type: ignore[arg-type]
        for kind, counts in (*kept.items(), ("guided", (128, 26)))
    ]
    models = trace(model, specs, facts, 1, DEFAULT_OPSET)
    return {spec.name: count_cost(model.graph) for spec, model in zip(specs, models, strict=True)}


def branch_macs(xl: dict[str, Cost], keep: int) -> int:
    """Return the MACs of a single-branch step with `keep` tokens in the 23 blocks of the route."""
    return xl["sparse-128"].linear_macs + XL_ROUTED * 12 * XL_WIDTH**2 * (keep - 128)


def test_xl_branches_cost_what_is_published(xl: dict[str, Cost]) -> None:
    condition = xl["condition"].linear_macs
    # Only linear layers are counted: the published 114.42 of a dense pass is 0.03 % higher.
    assert (condition + branch_macs(xl, 256)) / GIGA == pytest.approx(114.39, abs=0.005)
    assert (2 * condition + branch_macs(xl, 128) + branch_macs(xl, 26)) / GIGA == pytest.approx(97.65, abs=0.005)
    assert (2 * condition + branch_macs(xl, 256) + branch_macs(xl, 128)) / GIGA == pytest.approx(181.89, abs=0.005)


@pytest.mark.parametrize(
    ("name", "step", "with_condition"), [("guided-128-26", 89.04, 89.27), ("guided-256-128", 173.28, 173.51)]
)
def test_xl_guided_step_shares_the_prefix_and_the_conditioning(
    name: str, step: float, with_condition: float, xl: dict[str, Cost]
) -> None:
    strong, weak = (int(keep) for keep in name.split("-")[1:])
    macs = xl[name].linear_macs
    # At most the target, and not less than the work: each branch computes everything except the two
    # blocks before the route, the embedding and the head, which are shared.
    assert step - 0.02 < macs / GIGA <= step
    assert with_condition - 0.02 < (macs + xl["condition"].linear_macs) / GIGA <= with_condition
    once = 2 * 12 * XL_WIDTH**2 * XL_TOKENS + 2 * XL_TOKENS * XL_WIDTH * XL_PATCH_VALUES
    assert macs == branch_macs(xl, strong) + branch_macs(xl, weak) - once


@pytest.mark.parametrize("name", ["guided-128-26", "guided-256-128"])
def test_xl_guided_step_reads_a_third_of_the_weights_of_two_passes(name: str, xl: dict[str, Cost]) -> None:
    guided, condition = xl[name].weight_bytes, xl["condition"].weight_bytes
    # Two passes read the entire network, 675.1 M weights, twice. All single-branch graphs read the
    # same weights.
    two_passes = 2 * (condition + xl["sparse-128"].weight_bytes)
    assert two_passes / 8 == pytest.approx(675.1e6, rel=2e-4)
    assert 0.330 < guided / two_passes <= 0.332
    # One run of `condition` is shared by 40 steps.
    assert 0.334 < (guided + condition / 40) / two_passes <= 0.336
