"""The recorded kernel counts of DiT-XL/2 are those of the graphs, and within their limits."""

import json
from pathlib import Path
from typing import Any

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
    assert recorded("onnxruntime-cuda", "fp16", 1)["launches"] <= min(600, before / 2)
    for precision in ("fp16", "bf16", "fp32"):
        for batch in (1, None):
            assert recorded("onnxruntime-cuda", precision, batch)["launches"] < 0.75 * before


def test_recorded_kernels_are_those_of_the_script() -> None:
    assert RECORDED["kernels"] == {
        operator: {"types": list(kernel.types), "source": kernel.source} for operator, kernel in KERNELS.items()
    }


@pytest.mark.slow
def test_recorded_counts_are_those_of_the_graph() -> None:
    graph = xl_step("onnxruntime-cuda", "fp16", 1)
    row = recorded("onnxruntime-cuda", "fp16", 1)
    assert launches(graph) == row["by_operator"] | dict.fromkeys(("Reshape", "Unsqueeze"), 0)
    assert launches(graph).total() == row["launches"]
