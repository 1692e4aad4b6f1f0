"""Opening a backend, and ONNX Runtime sessions. Graphs that cannot run: `tests/attacks`."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from sg_runtime.backends import Backend, open_backend
from sg_runtime.backends.ort import PROVIDERS
from sg_runtime.bundle import Bundle
from sg_runtime.errors import EngineError, MissingExtraError, UsageError
from sg_runtime.manifest import GraphFacts
from sg_runtime.run.evaluate import run_once


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """Return a copy whose files a test may delete."""
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def feeds(rows: int) -> dict[str, NDArray[Any]]:
    return {"t": np.linspace(0, 1, rows, dtype=np.float32), "class": np.arange(rows, dtype=np.int64) % 5}


def run(backend: Backend, graph: GraphFacts, inputs: Any, output: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Run a graph and return its output, which has this shape."""
    found = np.empty(shape, np.float32)
    run_once(backend.lane(), graph, inputs, {output: found})
    return found


def modulations(backend: Backend, bundle: Bundle, rows: int) -> NDArray[Any]:
    shape = (rows, bundle.manifest.model.held["modulations"][0])
    return run(backend, condition(bundle), feeds(rows), "modulations", shape)


def condition(bundle: Bundle) -> GraphFacts:
    return bundle.manifest.hoisted("main")[0]


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_open_backend_of_a_known_device_runs_on_the_cpu(bundle: Bundle, device: str) -> None:
    backend = open_backend(bundle, device)
    assert backend.name == "onnxruntime-cpu"
    found = modulations(backend, bundle, 3)
    assert np.isfinite(found).all()
    assert found.std() > 0


@pytest.mark.parametrize("device", ["gpu", "CPU", "", "cuda:", "cpu:0", "cuda:-1", "auto:1"])
def test_open_backend_of_another_device_is_refused(bundle: Bundle, device: str) -> None:
    with pytest.raises(UsageError, match=f"device {device!r}: expected auto, cpu, cuda, or cuda:NUMBER"):
        open_backend(bundle, device)


def test_open_backend_without_the_library_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # makes the import fail
    with pytest.raises(MissingExtraError) as caught:
        open_backend(bundle, "cpu")
    assert str(caught.value) == "onnxruntime is not installed: pip install -e '.[ort]' in a checkout of sg-export"


def test_run_of_a_graph_opens_it_once(bundle: Bundle) -> None:
    """The second run works after the file is deleted."""
    backend = open_backend(bundle, "cpu")
    first = modulations(backend, bundle, 2)
    shutil.rmtree(bundle.path / "graphs")
    np.testing.assert_array_equal(modulations(backend, bundle, 2), first)


def test_run_of_one_graph_opens_no_other(bundle: Bundle) -> None:
    (bundle.path / "graphs/dense.onnx").unlink()
    assert np.isfinite(modulations(open_backend(bundle, "cpu"), bundle, 1)).all()


def test_run_of_a_step_graph_gives_the_output_that_is_asked_for(bundle: Bundle) -> None:
    """The outputs are the prediction D and next = a x + b D + e r.

    All values are small integers or halves, so the graph's sums are exact.
    """
    graph = bundle.manifest.graph("dense", 16)
    assert graph is not None
    x, r = np.ones((2, 2, 8, 8), np.float32), np.full((2, 2, 8, 8), 8, np.float32)
    scalars = {"c_in": 1, "c_skip": 2, "c_out": 0, "a": 3, "b": 4, "e": 0.5}
    step = {name: np.array(value, np.float32) for name, value in scalars.items()}
    step |= {"x": x, "r": r, "modulations": np.zeros((2, bundle.manifest.model.held["modulations"][0]), np.float32)}
    backend = open_backend(bundle, "cpu")
    assert np.unique(run(backend, graph, step, "prediction", x.shape)).tolist() == [2]
    assert np.unique(run(backend, graph, step, "next", x.shape)).tolist() == [3 + 4 * 2 + 0.5 * 8]
    with pytest.raises(EngineError, match=r"^graphs/dense\.onnx: ONNX Runtime failed: "):
        run(backend, graph, step, "velocity", x.shape)


@pytest.mark.parametrize(
    "wrong",
    [
        {"t": np.zeros(2, dtype=np.float32)},
        {"t": np.zeros(2, dtype=np.float64), "class": np.zeros(2, dtype=np.int64)},
        {"t": np.zeros((2, 1), dtype=np.float32), "class": np.zeros(2, dtype=np.int64)},
        {**feeds(2), "surprise": np.zeros(2, dtype=np.float32)},
    ],
    ids=["missing", "dtype", "rank", "unknown"],
)
def test_run_of_wrong_feeds_names_the_graph(bundle: Bundle, wrong: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(EngineError, match=r"^graphs/condition\.onnx: ONNX Runtime failed: "):
        run(
            open_backend(bundle, "cpu"),
            condition(bundle),
            wrong,
            "modulations",
            (2, bundle.manifest.model.held["modulations"][0]),
        )


def test_optimized_graph_for_the_cuda_provider_has_even_splits_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    """The CUDA provider's kernel for uneven splits copies their sizes through pinned memory.

    A captured CUDA graph cannot hold that copy.
    """
    disabled, optimized = PROVIDERS["onnxruntime-cuda"].disabled_optimizers, tmp_path / "optimized.onnx"
    for path in sorted(tiny_bundle.glob("graphs/*.onnx")):
        uneven = []
        for names in ((), disabled):
            options = onnxruntime.SessionOptions()
            options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
            onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"], disabled_optimizers=names)
            graph = ir.load(optimized).graph
            splits = [node for node in graph if node.op_type == "Split" and len(node.inputs) > 1]
            uneven.append([node.name for node in splits if np.ptp(node.inputs[1].const_value.numpy())])
        assert not uneven[1]
        if path.stem.startswith("guided"):
            assert uneven[0]  # otherwise the option would have no effect
