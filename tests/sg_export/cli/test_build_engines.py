"""`sg-export build` of engines, and what `inspect`, `doctor` and `verify` report about them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from sg_export.compiler import compile
from sg_export.cost.step import step_costs
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_runtime.bundle import Bundle

pytestmark = pytest.mark.slow

RTX = ("--target", "tensorrt-rtx", "--precision", "fp16", "--sm", "8.9")
UNGUIDED = ("--guidance", "none")
"""The mode with the fewest graphs, which another process traces fastest."""
VERSION = tensorrt_rtx.__version__


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SG_EXPORT_CACHE", str(cache))


def test_build_of_engines_tells_how_to_verify_first_then_phases_and_engines(
    cli: Callable[..., Any], quick_checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    result = cli("build", quick_checkpoint, *RTX, "--sparsity", 0.5, "--explain-cache", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    phases = ("Cloning network graph", "Preparing graph for optimization", "Building engine from subgraph")
    lines = [line for line in result.stderr.splitlines() if "guided-16-K" in line]
    assert [line.partition("] ")[2] for line in lines[-4:]] == [
        "building guided-16-K",
        *(f"building guided-16-K: {phase}" for phase in phases),
    ]
    assert f"miss: no engine of guided-16-K in {cache}" in result.stderr
    first, second, whole = result.stdout.splitlines()
    assert first.startswith("engines/condition.")
    assert f": tensorrt_rtx {VERSION} for SM 89, " in second
    assert "profile batch 1 keeping 16/8 tokens, 2 fused attentions, built in " in second
    assert whole.startswith(f"{tmp_path / 'out'}: 2 graphs, 2 engines, ")
    told = "engines run only on the GPUs that they are for, and the ONNX graphs are not kept: give --keep-onnx to "
    assert result.stderr.startswith(told)  # before the work
    again = cli(
        "build", quick_checkpoint, *RTX, "--sparsity", 0.5, "--explain-cache", "-o", tmp_path / "again", "--quiet"
    )
    assert [line.partition(": ")[2] for line in again.stderr.splitlines()] == ["hit", "hit"]


def test_build_of_engines_that_is_ended_by_a_signal_leaves_nothing(
    start: Callable[..., Any], tiny_checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    """SIGTERM and SIGHUP raise the same exception; see the test of `build` for ONNX graphs."""
    before = set(cache.iterdir())
    with start("build", tiny_checkpoint, *RTX, *UNGUIDED, "--batch", 7, "-o", "out") as building:
        for line in building.stderr:
            if "building dense: Building engine" in line:
                break
        building.send_signal(signal.SIGINT)
        rest = building.stderr.read()  # to the end: a living child would keep the pipe open
    assert building.returncode == 130, rest
    assert rest.endswith("; nothing was left half-written\n")
    assert not list(tmp_path.iterdir())
    kept = set(cache.iterdir()) - before
    assert {path.suffix for path in kept} == {".engine", ".json"}  # the condition's engine was complete
    assert len(kept) == 2


def test_build_whose_child_is_killed_says_what_to_do(
    start: Callable[..., Any], quick_checkpoint: Path, tmp_path: Path
) -> None:
    with start("build", quick_checkpoint, *RTX, *UNGUIDED, "--batch", 6, "-o", "out") as building:
        for line in building.stderr:
            if "building condition" in line:
                break
        child = None
        while child is None:
            assert building.poll() is None, "the build ended before it started a child"
            time.sleep(0.01)
            children = Path(f"/proc/{building.pid}/task/{building.pid}/children").read_text().split()
            child = next(iter(children), None)
        os.kill(int(child), signal.SIGKILL)
        rest = building.stderr.read()
    assert building.returncode == 4, rest
    assert "was killed, as the system does when memory runs out: build fewer sparsities or batch sizes" in rest
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def engines(quick_checkpoint: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that holds only engines."""
    options = CompileOptions(
        tmp_path_factory.mktemp("bundles") / "engines",
        (0.5,),
        precision="fp16",
        engines=EngineOptions(compute_capabilities=(89,), cache=cache),
    )
    return compile(quick_checkpoint, options).path


def test_inspect_of_engines_shows_them_and_the_precision(cli: Callable[..., Any], engines: Path) -> None:
    result = cli("inspect", engines)
    assert result.exit_code == 0, result.output
    assert "fp16, FP32 in x_embedder, t_embedder, y_embedder, final_layer.linear" in " ".join(result.stdout.split())
    assert "the engines' GPUs" in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if line.split()[:1] == ["guided-16-K"]]
    assert f"tensorrt_rtx {VERSION}" in row
    assert "batch 1 keeping 16/8 tokens" in row
    costs = json.loads(cli("inspect", engines, "--json").stdout)["step_costs"]
    assert [cost["way"] for cost in costs] == ["unguided", "CFG", "two passes", "this bundle"]


def test_costs_of_engines_alone_are_those_of_the_same_bundle_with_graphs(
    engines: Path, quick_checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    options = CompileOptions(
        tmp_path / "kept",
        (0.5,),
        precision="fp16",
        engines=EngineOptions(compute_capabilities=(89,), cache=cache, keep_onnx=True),
    )
    alone, kept = Bundle.open(engines).manifest, compile(quick_checkpoint, options).manifest
    assert step_costs(alone) == step_costs(kept)
    assert {graph.kind for graph in alone.graphs} == {"condition", "guided"}
    assert alone.engines == kept.engines  # build times, too: the cache held them
    assert kept.passes == ()


def test_doctor_of_engines_without_a_gpu_ends_with_6(refused: Callable[..., str], engines: Path) -> None:
    message = refused(6, "doctor", engines)
    assert (
        ": expected a GPU of compute capability 89, found none; run it on such a machine, or build for the" in message
    )
    assert "sg-export build quick.safetensors --strong-sparsity 0 --sparsity 0.5" in message


def test_doctor_of_a_bundle_with_graphs_names_the_backend_and_why_none_before(
    cli: Callable[..., Any], fixed_bundle: Path
) -> None:
    first, *reasons = cli("doctor", fixed_bundle).stdout.splitlines()
    assert first == f"{fixed_bundle}: device auto is onnxruntime-cpu"
    names = [reason.partition(":")[0] for reason in reasons]
    assert names == ["not tensorrt-rtx", "not tensorrt", "not onnxruntime-cuda"]


def test_generate_and_verify_of_engines_alone_end_with_6(
    refused: Callable[..., str], engines: Path, tmp_path: Path
) -> None:
    message = refused(6, "generate", engines, "--count", 1, "-o", tmp_path / "grid.png")
    assert "expected a GPU of compute capability 89, found none" in message
    assert "expected ONNX graphs, found only engines; rebuild it with --keep-onnx" in refused(6, "verify", engines)
    assert not list(tmp_path.iterdir())


def test_verify_of_engines_alone_saves_data_prints_commands_and_writes_no_results(
    cli: Callable[..., Any], engines: Path, quick_checkpoint: Path, tmp_path: Path
) -> None:
    outputs = ("--save-polygraphy", tmp_path / "data", "-o", tmp_path / "verify.json")
    result = cli("verify", engines, "--checkpoint", quick_checkpoint, *outputs)
    assert result.exit_code == 0, result.output
    first, *commands = result.stdout.splitlines()
    assert first == f"{engines}: nothing was compared: it holds engines alone; run these where their GPU is:"
    assert len(commands) == len(list((tmp_path / "data").glob("*-inputs.json"))) == 2
    assert all(line.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run ") for line in commands)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
