"""Choosing a backend, and ONNX Runtime's sessions. Graphs that it cannot run are in `tests/attacks`."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from sg_runtime.backends import open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.errors import EngineError, MissingExtraError, UsageError


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy, whose files a test may take away."""
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def feeds(rows: int) -> dict[str, np.ndarray]:
    return {"t": np.linspace(0, 1, rows, dtype=np.float32), "class": np.arange(rows, dtype=np.int64) % 5}


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_open_backend_of_a_known_device_runs_on_the_cpu(bundle: Bundle, device: str) -> None:
    backend = open_backend(bundle, device)
    assert backend.name == "onnxruntime-cpu"
    modulations = backend.run(bundle.manifest.condition, feeds(3))
    assert modulations.dtype == np.float32
    assert modulations.shape == (3, bundle.manifest.model.modulations)


@pytest.mark.parametrize("device", ["cuda:0", "gpu", "CPU", ""])
def test_open_backend_of_another_device_is_refused(bundle: Bundle, device: str) -> None:
    with pytest.raises(UsageError, match=f"device {device!r}: expected auto or cpu, the devices that this version"):
        open_backend(bundle, device)


def test_open_backend_without_the_library_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # Python's own way to make an import fail
    with pytest.raises(MissingExtraError) as caught:
        open_backend(bundle, "cpu")
    assert str(caught.value) == "onnxruntime is not installed: pip install 'sg-export[ort]'"


def test_run_of_a_graph_opens_it_once(bundle: Bundle) -> None:
    """The second run needs no file any more."""
    backend = open_backend(bundle, "cpu")
    first = backend.run(bundle.manifest.condition, feeds(2))
    shutil.rmtree(bundle.path / "graphs")
    np.testing.assert_array_equal(backend.run(bundle.manifest.condition, feeds(2)), first)


def test_run_of_one_graph_opens_no_other(bundle: Bundle) -> None:
    (bundle.path / "graphs/dense.onnx").unlink()
    backend = open_backend(bundle, "cpu")
    assert backend.run(bundle.manifest.condition, feeds(1)).shape[0] == 1


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
def test_run_of_wrong_feeds_names_the_graph(bundle: Bundle, wrong: dict[str, np.ndarray]) -> None:
    with pytest.raises(EngineError, match=r"^graphs/condition\.onnx: ONNX Runtime failed: "):
        open_backend(bundle, "cpu").run(bundle.manifest.condition, wrong)
