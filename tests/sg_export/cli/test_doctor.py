"""`sg-export doctor`."""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

import sg_export.cli
from sg_runtime import __version__
from sg_runtime.backends import ort_check
from sg_runtime.extras import Library

# The package attribute `doctor` is the command, not the module.
module = sys.modules[f"{sg_export.cli.__name__}.doctor"]


def test_doctor_shows_versions_and_providers(cli: Callable[..., Any]) -> None:
    result = cli("doctor")
    assert result.exit_code == 0
    for text in (f"sg-export {__version__}", torch.__version__, onnxruntime.__version__, "CPUExecutionProvider"):
        assert text in result.stdout
    assert "device auto: onnxruntime-cpu, for bundles" in result.stdout


def test_doctor_json_is_json(cli: Callable[..., Any]) -> None:
    facts = json.loads(cli("doctor", "--json").stdout)
    assert facts["sg-export"] == __version__
    assert facts["libraries"]["onnxruntime"] == onnxruntime.__version__
    assert set(facts["libraries"]) == {library.distribution for library in module.LIBRARIES}
    assert "CPUExecutionProvider" in facts["onnxruntime providers"]


def test_doctor_without_libraries_says_how_to_get_them(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIBRARIES", (Library("no_such", "no-such-distribution", "building", "export"),))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    result = cli("doctor")
    assert result.exit_code == 0
    assert "missing: pip install -e '.[export]' in a checkout of sg-export" in result.stdout
    assert "ONNX Runtime providers: none" in result.stdout
    assert "device auto: none; pip install -e '.[ort]' in a checkout of sg-export" in result.stdout
    assert json.loads(cli("doctor", "--json").stdout)["device auto"] is None


def test_doctor_says_why_the_gpu_is_not_used(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for GPUs without CUDA's libraries prints to standard output, where the JSON is."""
    printed = "Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(printed))
    monkeypatch.setattr(ort_check, "find_gpus", lambda extra: ("a GPU",))
    monkeypatch.setattr(ort_check, "driver_cuda", lambda: (13, 0))
    reason = (
        "onnxruntime-cuda: CUDAExecutionProvider cannot be loaded: libcublas.so.13: cannot open shared object file; "
        "pip install -e '.[ort-gpu]' in a checkout of sg-export"
    )
    facts = json.loads(cli("doctor", "--json").stdout)
    assert facts["device auto"] == "onnxruntime-cpu"
    assert facts["reasons against others"] == [reason]
    lines = cli("doctor").stdout.splitlines()
    assert lines[-3:-1] == ["device auto: onnxruntime-cpu, for bundles with ONNX graphs", f"not {reason}"]


def test_doctor_of_two_wheels_names_the_fault(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`dev` and `ort-gpu` together install both."""
    installed = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    found = SimpleNamespace(version=installed.__getitem__, PackageNotFoundError=KeyError)
    monkeypatch.setattr(ort_check, "metadata", found)
    (fault,) = json.loads(cli("doctor", "--json").stdout)["faults"]
    assert fault == (
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed and share their files, so neither works "
        "reliably: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install -e '.[ort-gpu]' in a checkout of "
        "sg-export"
    )
    assert f"fault: {fault}" in cli("doctor").stdout.splitlines()


def test_doctor_says_what_cuda_the_driver_supports(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(cli("doctor", "--json").stdout)["cuda of the driver"] == module._cuda()
    monkeypatch.setattr(module, "_cuda", lambda: "12.8")
    assert "NVIDIA's driver: for CUDA up to 12.8" in cli("doctor").stdout.splitlines()
