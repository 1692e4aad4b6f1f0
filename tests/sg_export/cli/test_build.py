"""`sg-export build`."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.bundle import Bundle
from sg_runtime.manifest import EVEN, GuidancePlan, Level, Route, Sampling

# Options of the bundle with the fewest graphs, which are also the fastest to trace.
SMALLEST = ("--guidance", "none", "--batch", 1)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_build_without_model_builds_the_reference_and_says_so(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("build", *SMALLEST)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(
        "no MODEL given: building the reference model glyphs\nloading glyphs\n[1/4] tracing"
    )
    assert result.stdout.startswith("glyphs-bundle: 2 graphs, ")
    assert Bundle.open("glyphs-bundle").manifest.source.reference == "glyphs"


@pytest.mark.slow
def test_build_in_another_process_gives_the_same_bytes(
    process: Callable[..., Any], build_once: Callable[..., Path], quick_checkpoint: Path, tmp_path: Path
) -> None:
    here = build_once("quick-bundle", quick_checkpoint, sparsity=(0.5,), batch=1)
    result = process("build", quick_checkpoint, "--sparsity", 0.5, "--batch", 1, "-o", "again")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert content(tmp_path / "again") == content(here)


def test_build_options_reach_the_bundle(cli: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "my.pt", {"model_state_dict": tiny.state(), "ema_state_dict": {}}, {})
    stated = ("--weights", "model", "--heads", 4, "--prediction", "flow", "--route", "0-1")
    runs = ("--scale", 3, "--interval", 0.25, 0.75, "--steps", 9, "--opset", 21, "-o", tmp_path / "out")
    result = cli("build", path, *SMALLEST, *stated, *runs, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads((tmp_path / "out/manifest.json").read_bytes())
    manifest = Bundle.open(tmp_path / "out").manifest
    assert (manifest.source.weights, manifest.model.heads, manifest.model.route) == ("model", 4, Route(0, 1))
    assert manifest.guidance == GuidancePlan("none", Level(0.0, 16), Level(0.0, 16), 3.0, interval=(0.25, 0.75))
    assert manifest.sampling == Sampling("euler", 9, EVEN)
    assert (manifest.opset, manifest.batch) == (21, 1)


def test_build_of_a_pair_that_is_not_sparser_says_that_it_is_skipped(
    cli: Callable[..., Any], quick_checkpoint: Path, tmp_path: Path
) -> None:
    strong = ("--strong-sparsity", 0, "--strong-sparsity", 0.5)
    result = cli("build", quick_checkpoint, *strong, "--batch", 1, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith("skipped the pair 0.5/0.5: its weak branch is not sparser\n")
    names = ["condition", "dense", "sparse-8", "guided-16-8"]
    assert [graph.name for graph in Bundle.open(tmp_path / "out").manifest.graphs] == names


def test_build_of_a_schedule_names_the_pairs_that_it_skips(
    cli: Callable[..., Any], quick_checkpoint: Path, tmp_path: Path
) -> None:
    rates = ("--strong-sparsity", 0, "--strong-sparsity", 0.5, "--sparsity", 0.5, "--sparsity", 0)
    result = cli("build", quick_checkpoint, *rates, "--schedule", "cosine", "--batch", 1, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped")]
    assert skipped == [
        f"skipped the pair {pair}: its weak branch is not sparser" for pair in ("0/0", "0.5/0.5", "0.5/0")
    ]
    manifest = Bundle.open(tmp_path / "out").manifest
    full, half = Level(0.0, 16), Level(0.5, 8)
    assert manifest.guidance == GuidancePlan("sg", full, half, 2.0, half, full)
    names = ["condition", "dense", "sparse-8", "guided-16-8"]
    assert [graph.name for graph in manifest.graphs] == names


@pytest.mark.slow
def test_build_without_onnxruntime_records_no_parity(
    process: Callable[..., Any], quick_checkpoint: Path, tmp_path: Path
) -> None:
    result = process("build", quick_checkpoint, *SMALLEST, "-o", "out", blocked=["onnxruntime"])
    assert result.returncode == 0, result.stderr
    assert [graph.parity for graph in Bundle.open(tmp_path / "out").manifest.graphs] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "sparsity 1: expected at least 0 and less than 1"),
        (["--sparsity", "-0.5"], "sparsity -0.5: expected at least 0 and less than 1"),
        (["--sparsity", "nan"], "sparsity nan: expected at least 0 and less than 1"),
        (["--sparsity", "0"], "sparsity 0 keeps all tokens: use a higher sparsity for the weak branch"),
        (["--sparsity", "0.01"], "sparsity 0.01 keeps all 16 tokens: use 0, or a higher sparsity"),
        (["--sparsity", "0.5", "--sparsity", "0.51"], "sparsities 0.5 and 0.51 both keep 8 tokens: give one of them"),
        (["--strong-sparsity", "0.5", "--sparsity", "0.25"], "raise --sparsity or lower --strong-sparsity"),
        (["--guidance", "cfg", "--sparsity", "0.5"], "sparsity: cfg guidance has no sparser branch"),
        (["--scale", "inf"], "scale: expected a finite float32 number, found inf"),
        (["--route", "2"], "route '2': expected START-END, both blocks included, such as 2-24"),
        (["--route", "all"], "route 'all': expected START-END"),
        (["--route", "2-1"], "route 2-1: expected 0 <= start <= end, both blocks included"),
        (["--route", "0-1,2-2"], "route '0-1,2-2': expected one route, found several, which are not supported"),
        (["--route", "1-3"], "tiny.safetensors: route 1-3: expected blocks 0 to 2"),
        (["--heads", "5"], "tiny.safetensors: heads: expected a divisor of the width 32, found 5"),
        (["--heads", "0"], "0 is not in the range x>=1"),
        (["--weights", "ema"], "holds a single bare state dict: leave out --weights ema"),
        (["--scale", "2:x"], "'2:x': expected a number, or two as FIRST:LAST"),
        (["--scale", "3:inf"], "scale: expected a finite float32 number, found inf"),
        (["--schedule", "linear"], "'linear' is not one of 'constant', 'cosine'"),
        (["--schedule", "cosine", "--sparsity", "0"], "raise --sparsity or lower --strong-sparsity"),
        (["--interval", "0.9", "0.1"], "interval: expected 0 <= lowest time <= highest time, found 0.9 to 0.1"),
        (["--interval", "0.9"], "Invalid value for '--interval': '-o' is not a valid float."),
        (["--guidance", "autoguidance"], "'autoguidance' is not one of 'sg', 'cfg', 'cfg+sg', 'none'"),
        (["--prediction", "eps"], "'eps' is not one of 'flow', 'edm'"),
        (["--guidance", "both"], "'both' is not one of 'sg', 'cfg', 'cfg+sg', 'none'"),
        (["--precision", "int4"], "'int4' is not one of 'fp32', 'fp16', 'bf16', 'int8', 'fp8'"),
        (["--precision", "bf16"], "precision bf16: ONNX Runtime's CPU provider has none: give fp32 or fp16"),
        (["--target", "openvino"], "'openvino' is not one of 'onnxruntime', 'onnxruntime-cuda', 'tensorrt-rtx'"),
        (
            ["--target", "onnxruntime-cuda", "--target", "tensorrt-rtx"],
            "--target onnxruntime-cuda: expected no other target, found tensorrt-rtx, which does not know its",
        ),
        (
            ["--target", "onnxruntime-cuda", "--precision", "int8"],
            "onnxruntime-cuda: expected no quantization, found int8",
        ),
        (
            ["--target", "tensorrt-rtx", "--sm", "90"],
            "--sm 90: TensorRT-RTX builds for 75, 80, 86, 89, 120, 121: for others, such as H100 (90)",
        ),
        (["--target", "tensorrt-rtx", "--sm", "7.5"], "--sm 75: expected matrix products in fp16, found fp32: give"),
        (["--target", "tensorrt-rtx", "--sm", "ada"], "'ada': expected a compute capability, for example 8.6 or 86"),
        (["--target", "tensorrt-rtx", "--workspace", "much"], "'much': expected a size, for example 512M or 4G"),
        (["--sm", "86"], "--sm: only for engines: give --target tensorrt-rtx"),
        (["--keep-onnx"], "--keep-onnx: only for engines: give --target tensorrt-rtx or tensorrt"),
        (
            ["--batch", "1", "--batch", "4"],
            "--batch: expected at most one for ONNX graphs, which are fixed to it, found 2",
        ),
        (["--steps", "-1"], "-1 is not in the range x>=1"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--opset", "19"], "19 is not in the range 20<=x<=22"),
        (["--opset", "23"], "23 is not in the range 20<=x<=22"),
    ],
    ids=" ".join,
)
def test_build_of_a_wrong_request_ends_with_2(
    arguments: list[str], message: str, refused: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert message in refused(2, "build", tiny_checkpoint, *arguments, "-o", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sg", "cfg", "cfg+sg", "none"])
def test_build_with_weak_checkpoint_for_another_mode_ends_with_2(
    mode: str, refused: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    words = ("--weak-checkpoint", tiny_checkpoint, "--guidance", mode, "-o", tmp_path / "out")
    assert refused(2, "build", tiny_checkpoint, *words) == (
        f"weak_checkpoint: expected one for autoguidance and for no other mode, found {tiny_checkpoint} for {mode}"
    )
    assert not list(tmp_path.iterdir())


def test_build_with_weak_checkpoint_of_another_network_ends_with_2(
    refused: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    message = refused(2, "build", tiny_checkpoint, "--weak-checkpoint", "glyphs-early", "-o", tmp_path / "out")
    assert message.startswith(
        "glyphs-early.safetensors: expected an earlier checkpoint of the network in tiny.safetensors; latent: "
    )
    assert message.endswith("; route: expected 1-1, found 1-6")
    assert not list(tmp_path.iterdir())


def test_build_with_missing_weak_checkpoint_ends_with_6(
    refused: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.pt"
    message = refused(6, "build", tiny_checkpoint, "--weak-checkpoint", missing, "-o", tmp_path / "out")
    assert message.startswith(f"{missing}: expected a checkpoint")
    assert not list(tmp_path.iterdir())


def test_build_if_quiet_prints_the_error_alone(cli: Callable[..., Any]) -> None:
    result = cli("build", "--sparsity", 2, "--quiet")
    assert (result.exit_code, result.output) == (2, "Error: sparsity 2: expected at least 0 and less than 1\n")


def test_build_without_route_shows_upstreams_usual(refused: Callable[..., str], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "my.pt", facts={"heads": 2, "prediction": "flow"})
    message = refused(2, "build", path, "--sparsity", 0.5, "-o", tmp_path / "out")
    assert message.endswith("give --route START-END, both blocks included; upstream's route for 3 blocks is 2-2")


@pytest.mark.parametrize(
    ("force", "message"),
    [
        ([], "exists: give another --output, or --force to replace it"),
        (["--force"], "exists and is not a bundle, so --force does not replace it: give another --output"),
    ],
)
def test_build_to_a_folder_of_the_users_ends_with_2(
    force: list[str], message: str, refused: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("")
    assert refused(2, "build", tiny_checkpoint, "-o", tmp_path, *force) == f"{tmp_path}: {message}"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_build_of_a_missing_checkpoint_ends_with_6(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "found nothing there" in refused(6, "build", tmp_path / "missing.pt", "-o", tmp_path / "out")


def test_build_of_a_checkpoint_that_overflows_ends_with_6(
    refused: Callable[..., str], quick: Any, tmp_path: Path
) -> None:
    state = quick.state()
    state["t_embedder.mlp.2.weight"] *= 1e38
    state["final_layer.adaLN_modulation.1.weight"] *= 1e10
    path = quick.save(tmp_path / "huge.safetensors", state)
    message = refused(6, "build", path, *SMALLEST, "-o", tmp_path / "out")
    assert message.startswith("huge.safetensors: expected finite values from the checkpoint in PyTorch")
    assert [path.name for path in tmp_path.iterdir()] == ["huge.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code", "message"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
    ],
)
def test_build_that_is_ended_by_a_signal_leaves_nothing(
    number: int, exit_code: int, message: str, start: Callable[..., Any], quick_checkpoint: Path, tmp_path: Path
) -> None:
    with start("build", quick_checkpoint, "-o", "out") as building:
        for line in building.stderr:
            if "tracing" in line:
                break
        time.sleep(0.1)  # let it enter PyTorch's exporter
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(f".out.{building.pid}-")
        building.send_signal(number)
        rest = building.stderr.read()
    assert building.returncode == exit_code, rest
    assert rest == f"Error: {message}; nothing was left half-written\n"
    assert not list(tmp_path.iterdir())


# The weights do not fit; the weights fit but a graph does not; the folder cannot be made.
@pytest.mark.slow
@pytest.mark.parametrize("limit", ["size=64k", "size=128k", "nr_inodes=1"])
def test_build_on_a_full_disk_ends_with_3(limit: str, mounted: Callable[..., Any], quick_checkpoint: Path) -> None:
    result = mounted(f"-t tmpfs -o {limit} none", "build", quick_checkpoint, *SMALLEST, "-o", "disk/out")
    assert result.returncode == 3, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "Error: disk/out: the disk is full; free some space, or give --output on another disk"
    )
    assert result.stdout == "left:\n"


@pytest.mark.slow
def test_build_on_a_read_only_disk_ends_with_2(mounted: Callable[..., Any], quick_checkpoint: Path) -> None:
    result = mounted("-t tmpfs -o ro none", "build", quick_checkpoint, *SMALLEST, "-o", "disk/out")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"Error: disk/out: cannot be written ({os.strerror(30)}): give another --output"
    )
    assert result.stdout == "left:\n"
