"""`sg-export bench`, and the backends that run a bundle in the other commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def test_bench_prints_a_table_with_reasons_and_the_share(cli: Callable[..., Any], tiny_bundle: Path) -> None:
    result = cli("bench", tiny_bundle, "--images", 2, "--steps", 2, "--runs", 2, "--baseline", "pytorch")
    assert result.exit_code == 0, result.output
    assert "images at once: 2, 2 euler steps, 2 runs, on cpu" in result.stdout
    for word in ("precision", "p50", "p99", "images/s", "onnxruntime-cpu", "pytorch", "fp32"):
        assert word in result.stdout
    assert "not tensorrt-rtx: the bundle has no engines of TensorRT-RTX" in result.stdout
    assert "share of the machine's peak: " in result.stdout
    assert "timing pytorch" in result.stderr


def test_bench_json_is_json_alone(cli: Callable[..., Any], tiny_bundle: Path) -> None:
    result = cli("bench", tiny_bundle, "--steps", 1, "--runs", 1, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert content["sides"][0]["step"].keys() == {"p50", "p90", "p99"}
    assert content["images"] == 1


@pytest.mark.parametrize("command", ["bench", "generate", "verify"])
def test_a_device_that_is_not_there_ends_with_what_is(
    command: str, refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    more = ["-o", tmp_path / "x.npy"] if command == "generate" else []
    assert "expected auto, cpu, cuda, or cuda:NUMBER" in refused(2, command, tiny_bundle, "--device", "gpu", *more)
    message = refused(4, command, tiny_bundle, "--device", "cuda", *more)
    assert message.startswith("ONNX Runtime here has no CUDAExecutionProvider; for an NVIDIA GPU: ")
    assert "pip install -e '.[ort-gpu]' in a checkout of sg-export" in message


def test_generate_on_a_named_backend_gives_what_auto_does(
    cli: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    for name, options in {"auto": [], "named": ["--backend", "onnxruntime-cpu"]}.items():
        result = cli("generate", tiny_bundle, "--count", 2, "--steps", 2, "-o", tmp_path / f"{name}.npy", *options)
        assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "auto.npy"), np.load(tmp_path / "named.npy"))


def test_verify_on_a_device_compares_what_runs_there(
    cli: Callable[..., Any], tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The runtime's own lanes give the same number of comparisons, and they are as close."""
    found = {}
    for name, options in {"plain": [], "device": ["--device", "cpu"]}.items():
        output = tmp_path / f"{name}.json"
        result = cli("verify", tiny_bundle, "--checkpoint", tiny_checkpoint, "-o", output, "-q", *options)
        assert result.exit_code == 0, result.output
        found[name] = json.loads(output.read_text())["comparisons"]
    assert [c["subject"] for c in found["device"]] == [c["subject"] for c in found["plain"]]
    assert all(c["passed"] for c in found["device"])
