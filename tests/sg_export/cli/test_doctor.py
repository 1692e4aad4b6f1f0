"""`sg-export doctor`."""

import json
import sys
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch

import sg_export.cli
from sg_runtime import __version__
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
