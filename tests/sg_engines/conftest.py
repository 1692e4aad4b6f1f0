"""Small graphs for engines, and one built engine."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper, save

from sg_engines.trt import EngineRecipe, build_engine


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Files of y = x w by the data type of the matmul; x and y are FP32 with any number of rows."""
    folder = tmp_path_factory.mktemp("graphs")
    types = {
        "fp32": (TensorProto.FLOAT, np.float32),
        "fp16": (TensorProto.FLOAT16, np.float16),
        "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    }
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 16]) for name in "xy")
    for name, (kind, dtype) in types.items():
        weights = numpy_helper.from_array(np.linspace(-1, 1, 256).reshape(16, 16).astype(dtype), "w")
        nodes = [
            helper.make_node("Cast", ["x"], ["typed"], "before", to=kind),
            helper.make_node("MatMul", ["typed", "w"], ["product"], "multiply"),
            helper.make_node("Cast", ["product"], ["y"], "after", to=TensorProto.FLOAT),
        ]
        graph = helper.make_graph(nodes, "product", [x], [y], [weights])
        opset = helper.make_opsetid("", 20)
        save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in types}


@pytest.fixture(scope="session")
def plan() -> EngineRecipe:
    """A recipe for two rows and one kind of GPU."""
    return EngineRecipe(({"x": (2, 16)},), (86,))


@pytest.fixture(scope="session")
def engine(products: Mapping[str, Path], plan: EngineRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP16 matmul as an engine that this process built."""
    path = tmp_path_factory.mktemp("engines") / "fp16.engine"
    build_engine(tensorrt_rtx, products["fp16"], plan, path, lambda *progress: None)
    return path
