"""A weights file shared by several graphs."""

import errno
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from sg_export.graph.check import check_graph
from sg_export.graph.weights import write_graphs
from sg_runtime.errors import ExportError

FILE = "all.bin"


def model(name: str, op: str, **initializers: np.ndarray) -> ir.Model:
    """Return a model of y = op(x, w); w is the first initializer, and the others are unused."""
    x = ir.val("x", ir.DataType.FLOAT, ["N"])
    values = [ir.val(key, const_value=ir.tensor(array, name=key)) for key, array in initializers.items()]
    node = ir.node(op, [x, values[0]])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(["N"])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20}, name=name)
    return ir.Model(graph, ir_version=10)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def test_write_graphs_with_shared_weight_stores_it_once(tmp_path: Path) -> None:
    weight = np.arange(1000, dtype=np.float32)
    paths = write_graphs([model("one", "Add", w=weight), model("two", "Mul", w=weight)], tmp_path, FILE)
    assert [path.name for path in paths] == ["one.onnx", "two.onnx"]
    assert (tmp_path / FILE).stat().st_size == weight.nbytes
    x = np.full(1000, 2, np.float32)
    assert np.array_equal(run(paths[0], x), weight + 2)
    assert np.array_equal(run(paths[1], x), weight * 2)


def test_write_graphs_with_own_weights_keeps_each(tmp_path: Path) -> None:
    a, b = np.full(1000, 3, np.float32), np.full(1000, 5, np.float32)
    paths = write_graphs([model("one", "Add", a=a), model("two", "Add", b=b)], tmp_path, FILE)
    x = np.zeros(1000, np.float32)
    assert np.array_equal(run(paths[0], x), a)
    assert np.array_equal(run(paths[1], x), b)


def test_write_graphs_with_small_tensors_keeps_them_in_the_graphs(tmp_path: Path) -> None:
    small = np.ones(255, np.float32)
    (path,) = write_graphs([model("one", "Add", w=small)], tmp_path, FILE)
    assert np.array_equal(run(path, small), small + 1)
    assert not (tmp_path / FILE).exists() or (tmp_path / FILE).stat().st_size == 0


def test_write_graphs_with_large_positions_keeps_them_in_the_graph(tmp_path: Path) -> None:
    """Shape inference adds int64 values, and cannot read them from a file."""
    x = ir.val("x", ir.DataType.INT64, ["N"])
    positions = ir.val("p", const_value=ir.tensor(np.arange(1000), name="p"))
    node = ir.node("Add", [x, positions])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.INT64, ir.Shape([1000])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[positions], opset_imports={"": 20}, name="one")
    (path,) = write_graphs([ir.Model(graph, ir_version=10)], tmp_path, FILE)
    check_graph(path)
    assert np.array_equal(run(path, np.arange(1000)), 2 * np.arange(1000))


@pytest.mark.parametrize("other", [np.ones(2000, np.float32), np.ones(1000, np.int32)], ids=["shape", "dtype"])
def test_write_graphs_with_one_name_for_two_tensors_raises(other: np.ndarray, tmp_path: Path) -> None:
    models = [model("one", "Add", w=np.ones(1000, np.float32)), model("two", "Add", w=other)]
    with pytest.raises(ExportError, match="graph two: initializer w differs between graphs"):
        write_graphs(models, tmp_path, FILE)
    assert not list(tmp_path.iterdir())


def test_write_graphs_of_initializer_without_value_raises(tmp_path: Path) -> None:
    broken = model("one", "Add", w=np.ones(1000, np.float32))
    broken.graph.initializers["w"].const_value = None
    with pytest.raises(ExportError, match="graph one: initializer w has no value"):
        write_graphs([broken], tmp_path, FILE)


@pytest.mark.parametrize(("room", "number"), [(4000, None), (3999, errno.ENOSPC)])
def test_write_graphs_to_a_full_disk_raises_the_systems_error(
    room: int, number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy's error has no number. Then the partial file is removed, and the disk has room."""

    def fail(*_: object) -> None:
        raise OSError("problem writing element 23552 to file")

    monkeypatch.setattr(ir.external_data, "convert_tensors_to_external", fail)
    monkeypatch.setattr("sg_export.graph.weights.is_full", lambda folder, size: size > room)
    with pytest.raises(OSError, match="writing element" if number is None else "No space left on device") as caught:
        write_graphs([model("one", "Add", w=np.ones(1000, np.float32))], tmp_path, FILE)
    assert caught.value.errno == number
