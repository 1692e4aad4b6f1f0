"""Costs counted from a graph beside what a DiT costs by its shape."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sg_export.cost import count_cost
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import Cost, Manifest

D, N, M, C, PATCH, DEPTH = 32, 16, 128, 2, 2, 3
EMBED_AND_HEAD = 2 * N * D * C * PATCH**2
BLOCK = 12 * D**2
"""Multiply-adds of a block's linear layers for one token: qkv 3, proj 1, the MLP 8 times D²."""


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


def cost(manifest: Manifest, name: str) -> Cost:
    (found,) = (graph.cost for graph in manifest.graphs if Path(graph.file).stem == name)
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
def test_count_cost_of_guided_has_the_prefix_and_the_head_once(strong: int, weak: int, manifest: Manifest) -> None:
    found = cost(manifest, f"guided-{strong}-{weak}")
    assert found.linear_macs == BLOCK * (N + strong + weak + 2 * N) + EMBED_AND_HEAD
    assert found.attention_macs == 2 * D * (N**2 + strong**2 + weak**2 + 2 * N**2)


def test_count_cost_of_condition_is_embedder_and_adaln(manifest: Manifest) -> None:
    found = cost(manifest, "condition")
    assert found.linear_macs == 256 * D + D**2 + DEPTH * 6 * D**2 + 2 * D**2
    assert found.attention_macs == 0


def test_count_cost_weights_are_those_of_the_checkpoint(manifest: Manifest) -> None:
    adaln = DEPTH * (6 * D * D + 6 * D) + 2 * D * D + 2 * D
    condition = 256 * D + D + D * D + D + 6 * D + adaln
    step = manifest.model.parameters - condition
    # Beside the checkpoint's tensors a graph holds small constants: frequencies, unit scales, shapes, slice bounds.
    assert 0 < cost(manifest, "condition").weight_bytes - 4 * condition < 1024
    for graph in manifest.graphs:
        if graph.kind != "condition":
            assert 0 < graph.cost.weight_bytes - 4 * step < 1024, graph.file


def one_node(text: str) -> ir.Graph:
    """The graph of `text`, whose input w is made an initializer."""
    graph = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {text}').graph
    weight = graph.inputs.pop()
    assert weight.shape is not None
    weight.const_value = ir.tensor(np.zeros(weight.shape.numpy(), np.float32), name=weight.name)
    graph.register_initializer(weight)
    return graph


@pytest.mark.parametrize(
    ("text", "linear"),
    [
        ("(float[N, 3] x, float[3, 5] w) => (float[N, 5] y) { y = MatMul(x, w) }", 15),
        ("(float[4, 3] x, float[3, 5] w) => (float[4, 5] y) { y = MatMul(x, w) }", 15),
        ("(float[N, 3] x, float[3, 5] w) => (float[N, 5] y) { y = Gemm(x, w) }", 15),
        ("(float[N, 3] x, float[5, 3] w) => (float[N, 5] y) { y = Gemm<transB=1>(x, w) }", 15),
        ("(float[N, 3] x, float[3, 5] w) => (float[N, 5] y) { y = Gemm<transB=0>(x, w) }", 15),
        ("(float[2, 7, 3] x, float[3, 5] w) => (float[2, 7, 5] y) { y = MatMul(x, w) }", 7 * 15),
        (
            "(float[N, 2, 8, 8] x, float[6, 2, 2, 2] w) => (float[N, 6, 4, 4] y) { y = Conv<strides=[2, 2]>(x, w) }",
            6 * 16 * 8,
        ),
        ("(float[N, 3] x, float[3] w) => (float[N, 3] y) { y = Mul(x, w) }", 0),
    ],
)
def test_count_cost_of_one_node_is_for_one_image(text: str, linear: int) -> None:
    graph = one_node(text)
    assert count_cost(graph) == Cost(linear, 0, graph.initializers["w"].const_value.nbytes)  # type: ignore[union-attr]
