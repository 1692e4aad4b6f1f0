"""Open a graph with ONNX Runtime, as the runtime does."""

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from sg_export.graph.check import run_onnx
from sg_runtime.errors import EngineError, MissingExtraError


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Graph of y = x + 1 and z = -x, with two values each."""
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xyz")
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    nodes = [helper.make_node("Add", ["x", "one"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y, z], [one]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_run_onnx_gives_all_outputs_in_order(graph: Path) -> None:
    y, z = run_onnx(graph, {"x": np.array([1, 2], np.float32)})
    assert y.tolist() == [2, 3]
    assert z.tolist() == [-1, -2]


@pytest.mark.parametrize(
    "feeds",
    [{}, {"x": np.zeros(3, np.float32)}, {"x": np.zeros(2, np.float64)}, {"w": np.zeros(2, np.float32)}],
    ids=["none", "shape", "dtype", "name"],
)
def test_run_onnx_with_wrong_feeds_raises(feeds: dict[str, np.ndarray], graph: Path) -> None:
    with pytest.raises(EngineError, match=r"^g.onnx: ONNX Runtime failed: ") as caught:
        run_onnx(graph, feeds)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("content", [b"", b"no graph"], ids=["empty", "text"])
def test_run_onnx_of_no_graph_raises(content: bytes, graph: Path) -> None:
    graph.write_bytes(content)
    with pytest.raises(EngineError, match=r"^g.onnx: ONNX Runtime .* cannot open it: "):
        run_onnx(graph, {"x": np.zeros(2, np.float32)})


def test_run_onnx_of_a_graph_whose_weights_are_missing_raises(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "dense.onnx"
    path.write_bytes((tiny_bundle / "graphs/dense.onnx").read_bytes())
    with pytest.raises(EngineError, match=r"^dense.onnx: ONNX Runtime .* cannot open it: .*weights.bin"):
        run_onnx(path, {})


def test_run_onnx_without_onnxruntime_names_the_extra(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed: pip install -e '\.\[ort\]'"):
        run_onnx(graph, {"x": np.zeros(2, np.float32)})
