"""Half precision in FP32 operators: it rounds as the type does and finds values out of range."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from sg_export.graph.emulate import emulated
from sg_export.graph.half import HALF, to_half
from sg_export.graph.overflow import first_overflow, range_shares
from sg_runtime.backends.ort import open_session
from sg_runtime.manifest import HalfPrecision

MLP = """(float[N, 64] x, float[64, 64] w) => (float[N, 64] z) <float[N, 64] y> {
    y = MatMul(x, w)
    z = MatMul(y, w)
}"""
DTYPES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}

Write = Callable[[HalfPrecision, NDArray[np.float32]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a graph of two matmuls with one weight, in half precision."""

    def write(precision: HalfPrecision, weight: NDArray[np.float32]) -> Path:
        model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {MLP}')
        value = model.graph.inputs.pop()
        value.const_value = ir.tensor(weight, name="w")
        model.graph.register_initializer(value)
        for node, name in zip(model.graph, ("first/MatMul", "second/MatMul"), strict=True):
            node.name = name
        to_half(model.graph, precision, ())
        ir.save(model, tmp_path / "g.onnx")
        return tmp_path / "g.onnx"

    return write


@pytest.mark.parametrize("precision", HALF)
def test_emulated_rounds_inputs_weights_and_every_result(precision: HalfPrecision, write: Write) -> None:
    generator, dtype = np.random.default_rng(0), DTYPES[precision]
    x, w = generator.standard_normal((5, 64), np.float32), generator.standard_normal((64, 64), np.float32) / 8
    path = write(precision, w)
    onnx.checker.check_model(emulated(path), full_check=True)
    (found,) = open_session(path, emulated(path)).run(None, {"x": x})

    def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values.astype(dtype).astype(np.float32)

    wanted = rounded(rounded(rounded(x) @ rounded(w)) @ rounded(w))
    # The matmuls sum in another order, so a value sometimes rounds to its neighbour.
    assert (found == wanted).mean() > 0.9
    np.testing.assert_allclose(found, wanted, atol=float(ml_dtypes.finfo(dtype).eps) * 8)  # type: ignore[no-untyped-call]
    exact = (x @ w) @ w
    assert np.linalg.norm(found - exact) > 0.1 * float(ml_dtypes.finfo(dtype).eps) * np.linalg.norm(exact)  # type: ignore[no-untyped-call]


def test_range_shares_are_of_each_product_in_order(write: Write) -> None:
    path = write("fp16", np.eye(64, dtype=np.float32) * 2)
    x = np.zeros((1, 64), np.float32)
    x[0, 3] = -100.0
    assert range_shares(path, {"x": x}) == {"first/MatMul": 200 / 65504, "second/MatMul": 400 / 65504}
    assert first_overflow(path, {"x": x}) is None


def test_first_overflow_is_the_first_operator_out_of_range(write: Write) -> None:
    path = write("fp16", np.eye(64, dtype=np.float32) * 100)
    x = np.full((1, 64), 30.0, np.float32)
    assert first_overflow(path, {"x": x}) == "second/MatMul"
    assert first_overflow(path, {"x": 100 * x}) == "first/MatMul"
    assert first_overflow(path, {"x": np.nan * x}) == "first/MatMul"


def test_first_overflow_in_bf16_is_beyond_that_of_fp16(write: Write) -> None:
    path = write("bf16", np.eye(64, dtype=np.float32) * 1e4)
    assert first_overflow(path, {"x": np.full((1, 64), 1e6, np.float32)}) is None


@pytest.mark.parametrize("precision", HALF)
def test_emulated_takes_and_returns_fp32_in_place_of_half_precision(precision: HalfPrecision, tmp_path: Path) -> None:
    text = "(float[N] text_keys) => (float[N] text_values) { text_values = Add(text_keys, text_keys) }"
    model, path = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {text}'), tmp_path / "g.onnx"
    to_half(model.graph, precision, ())
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {HALF[precision]}
    ir.save(model, path)
    onnx.checker.check_model(emulated(path), full_check=True)
    values = np.array([1.0, 1 / 3, -2 / 3], np.float32)
    (found,) = open_session(path, emulated(path)).run(None, {"text_keys": values})
    assert found.dtype == np.float32
    rounded = values.astype(DTYPES[precision])
    np.testing.assert_array_equal(found, (rounded + rounded).astype(np.float32))  # doubling is exact
