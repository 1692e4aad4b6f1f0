"""Checks of written graphs."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sg_export.graph.check import check_graph
from sg_runtime.errors import ExportError


def write_model(path: Path, nodes: list[onnx.NodeProto], rows: int = 2) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("NoSuchOperator", ["x"], ["y"]),
        helper.make_node("Relu", ["absent"], ["y"]),
        helper.make_node("Concat", ["x", "x"], ["y"], axis=0),
    ],
    ids=["operator", "input", "shape"],
)
def test_check_graph_of_a_wrong_graph_raises(node: onnx.NodeProto, tmp_path: Path) -> None:
    path = write_model(tmp_path / "wrong.onnx", [node])
    with pytest.raises(ExportError, match=rf"^graph wrong.onnx: ONNX {onnx.__version__} refuses it: "):
        check_graph(path)


def test_check_graph_of_a_right_graph_leaves_it_alone(tmp_path: Path) -> None:
    path = write_model(tmp_path / "right.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    before = path.read_bytes()
    check_graph(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"right.onnx": before}
