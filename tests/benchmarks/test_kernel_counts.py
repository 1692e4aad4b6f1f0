"""The recorded kernel counts of DiT-XL/2 are those of the graphs, and within their limits."""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from benchmarks.kernel_counts import KERNELS, launches, xl_step

RECORDED = json.loads((Path(__file__).parents[2] / "benchmarks/results/kernel_counts.json").read_text())


def recorded(target: str, precision: str, batch: int | None) -> dict[str, Any]:
    (row,) = (
        row
        for row in RECORDED["counts"]
        if (row["target"], row["precision"], row["batch"]) == (target, precision, batch)
    )
    found: dict[str, Any] = row
    return found


def test_recorded_step_for_cuda_has_less_than_half_of_the_kernels() -> None:
    before = recorded("onnxruntime", "fp16", 1)["launches"]
    assert recorded("onnxruntime-cuda", "fp16", 1)["launches"] <= min(450, before / 2)
    assert recorded("onnxruntime-cuda", "fp16", None)["launches"] <= min(600, before / 2)
    for precision in ("fp16", "bf16", "fp32"):
        for batch in (1, None):
            assert recorded("onnxruntime-cuda", precision, batch)["launches"] < 0.75 * before


def test_recorded_kernels_are_those_of_the_script() -> None:
    assert RECORDED["kernels"] == {
        operator: {"types": list(kernel.types), "source": kernel.source} for operator, kernel in KERNELS.items()
    }


def attention(kind: str, images: str, queries: int, keys: int, bias: bool = False) -> ir.Graph:
    """Return a graph of one attention with 16 heads of 72, as in XL/2."""
    width = 16 * 72
    q, k, b = f"{kind}[{images}, {queries}, {width}]", f"{kind}[{images}, {keys}, {width}]", f"{kind}[1, 1, 1, 1]"
    given = f"{q} q, {k} k, {b} b"
    call = f"com.microsoft.MultiHeadAttention <num_heads = 16> (q, k, k{', , , b' if bias else ''})"
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g ({given}) => ({q} y) {{ y = {call} }}'
    ).graph


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (("float16", "1", 256, 256), 2),  # 64 blocks on 132 multiprocessors: the keys are split
        (("bfloat16", "B", 256, 256), 2),  # as for one image
        (("float16", "2", 256, 256), 1),
        (("float16", "1", 128, 128), 1),  # fewer blocks, but one part of the keys
        (("float16", "1", 384, 384, True), 1),
        (("float16", "1", 130, 384, True), 7),  # no row of the bias is aligned
        (("bfloat16", "1", 384, 384, True), 7),
        (("float", "1", 256, 256), 1),
        (("float", "1", 128, 128), 7),
        (("float", "1", 264, 264, True), 7),
    ],
)
def test_launches_of_an_attention(form: tuple[Any, ...], expected: int) -> None:
    assert launches(attention(*form)) == {"MultiHeadAttention": expected}


@pytest.mark.slow
def test_recorded_counts_are_those_of_the_graph() -> None:
    graph = xl_step("onnxruntime-cuda", "fp16", 1)
    row = recorded("onnxruntime-cuda", "fp16", 1)
    assert launches(graph) == row["by_operator"] | dict.fromkeys(("Reshape", "Unsqueeze"), 0)
    assert launches(graph).total() == row["launches"]
