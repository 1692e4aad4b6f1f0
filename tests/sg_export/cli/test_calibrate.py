"""`sg-export calibrate`, and other commands that use its table or bundles in INT8."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.bundle import Bundle
from sg_runtime.manifest import QualityGates

pytestmark = pytest.mark.slow

LEAST = ("--calib-samples", 1)
WIDE = ("--gate-cosine", 0.5, "--gate-guided", 1)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the quick model's table."""
    return tmp_path_factory.mktemp("tables") / "ranges.json"


def test_calibrate_writes_a_table_that_build_takes(
    cli: Run, quick_checkpoint: Path, table: Path, tmp_path: Path
) -> None:
    feeds = tmp_path / "feeds"
    result = cli("calibrate", quick_checkpoint, *LEAST, "--folder", feeds, "-o", table)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{table}: ranges of 4 layers, from 49 evaluations of 1 images\n"
    assert "collecting sg-16-8-0.npz" in result.stderr
    assert {path.name for path in feeds.iterdir()} == {"feeds.json", "sg-16-8-0.npz"}
    again = cli("calibrate", quick_checkpoint, *LEAST, "--folder", feeds, "-o", tmp_path / "again.json")
    assert "collecting" not in again.stderr
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(table.read_text())
    own = cli("calibrate", quick_checkpoint, "--calib-data", feeds, "-o", tmp_path / "own.json", "--quiet")
    assert (own.exit_code, own.output) == (0, "")
    assert json.loads((tmp_path / "own.json").read_text())["layers"] == json.loads(table.read_text())["layers"]
    words = ("--calibration", table, "--exclude", "blocks.0.mlp.fc2", "--method", "min-max", *WIDE)
    result = cli("build", quick_checkpoint, "--precision", "int8", *words, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "measuring ranges" not in result.stderr
    assert "int8: 5 of 6 layers; guided prediction within " in result.stdout
    assert "in fp32: blocks.0.mlp.fc2" in result.stdout
    plan = Bundle.open(tmp_path / "out").manifest.quantization
    assert plan is not None
    assert (plan.method, plan.gates, plan.images) == ("min-max", QualityGates(0.5, 1.0), 1)


def test_calibrate_with_data_that_is_none_ends_with_a_message(
    refused: Run, quick_checkpoint: Path, tmp_path: Path
) -> None:
    message = refused(6, "calibrate", quick_checkpoint, "--calib-data", tmp_path, "-o", tmp_path / "ranges.json")
    assert message == f"{tmp_path}: expected .npz files with x, time and conditions, found none"
    assert not list(tmp_path.iterdir())


def test_calibrate_into_a_folder_that_is_not_there_says_so(
    refused: Run, quick_checkpoint: Path, tmp_path: Path
) -> None:
    message = refused(2, "calibrate", quick_checkpoint, *LEAST, "-o", tmp_path / "missing/ranges.json")
    assert message.startswith(f"{tmp_path / 'missing/ranges.json'}: cannot be written")


def test_calibrate_to_the_facts_of_its_checkpoint_is_refused(refused: Run, quick: Any, tmp_path: Path) -> None:
    checkpoint = quick.save(tmp_path / "last.pt")
    message = refused(2, "calibrate", checkpoint, *LEAST, "-o", tmp_path / "last.json")
    assert message == f"{tmp_path}/last.json: is an input of this command: give another --output"


def test_calibrate_with_a_folder_that_cannot_be_made_is_refused(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ("--folder", tmp_path / "file/states", "-o", tmp_path / "ranges.json")
    message = refused(2, "calibrate", tmp_path / "missing.pt", *LEAST, *words)
    assert message == f"{tmp_path}/file/states: cannot be written (Not a directory): give another --folder"


def test_build_with_quantization_options_that_make_no_sense_is_refused(
    refused: Run, quick_checkpoint: Path, tiny_ranges: Path, tmp_path: Path
) -> None:
    build = ("build", quick_checkpoint, "-o", tmp_path / "out")
    for words in (("--base-precision", "fp16"), ("--exclude", "blocks.0.mlp.fc1"), ("--calib-samples", 16)):
        assert refused(2, *build, *words) == f"{words[0]}: only with --precision int8 or fp8, found fp32"
    unused = ("--calibration", tiny_ranges, "--calib-samples", 4)
    assert refused(2, *build, "--precision", "int8", *unused).startswith("--calib-samples: only if ranges are measured")
    for gate in ("inf", "nan"):
        assert refused(2, *build, "--precision", "int8", "--gate-guided", gate).startswith("gates: expected a cosine ")
    missing = refused(2, *build, "--precision", "int8", "--calibration", tmp_path / "none.json")
    assert missing.endswith("found no file: make it with sg-export calibrate")
    both = ("--calibration", tiny_ranges, "--calib-data", tmp_path)
    assert refused(2, *build, "--precision", "int8", *both).startswith("--calibration and --calib-data: expected one")
    assert refused(2, *build, "--precision", "fp8", "--target", "tensorrt-rtx").startswith(
        "--precision fp8: expected --sm"
    )
    for option in ("--calib-data", "--like"):
        missing = refused(2, *build, "--precision", "int8", option, tmp_path / "none")
        assert missing == f"{option} {tmp_path / 'none'}: found no folder of this name"
    both = ("--like", tmp_path, "--exclude", "blocks.0.mlp.fc1")
    assert refused(2, *build, "--precision", "int8", *both).startswith("--like and --exclude: expected one of them")
    near = refused(2, *build, "--precision", "int8", *LEAST, "--exclude", "blocks.0.mlp.fc")
    assert "near: blocks.0.mlp.fc" in near
    assert "found ranges of model" in refused(6, *build, "--precision", "int8", "--calibration", tiny_ranges)
    assert not (tmp_path / "out").exists()


def test_build_that_fails_its_gates_ends_with_5(refused: Run, quick_checkpoint: Path, tmp_path: Path) -> None:
    words = ("--precision", "int8", *LEAST, "--gate-cosine", 1, "--gate-guided", 0)
    message = refused(5, "build", quick_checkpoint, *words, "-o", tmp_path / "out")
    assert message.startswith("int8: expected a cosine of at least 1 for each branch")
    assert not list(tmp_path.iterdir())


def test_inspect_of_a_quantized_bundle_shows_layers_and_times(
    cli: Run, tiny_int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = cli("inspect", tiny_int8_bundle)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = {words[0]: words[1:] for words in lines if words and words[0].startswith(("blocks.", "final_layer."))}
    assert len(rows) == 16
    assert rows["blocks.1.attn.qkv"][:2] == ["int8", "quantized"]
    assert rows["blocks.1.adaLN_modulation.1"][:3] == ["int8", "weights", "quantized"]
    assert rows["blocks.2.mlp.fc2"][:2] == ["fp32", "excluded"]
    assert "ranges by percentile of 392 evaluations of 4 images" in result.stdout
    assert "gates: cosine 0.5, guided 100%" in result.stdout
    assert sum(len(words) == 4 and words[3].endswith("%") for words in lines) == 25
    assert "two FP32 runs with different kept tokens" in result.stdout
    content = json.loads(cli("inspect", tiny_int8_bundle, "--json").stdout)
    assert len(str(content)) > 1000
    assert "int8" in json.dumps(content)


def test_verify_of_a_quantized_bundle_compares_branches_at_every_time(
    cli: Run, tiny_int8_bundle: Path, tmp_path: Path
) -> None:
    result = cli("verify", tiny_int8_bundle, "--output", tmp_path / "parity.json")
    assert result.exit_code == 0, result.output
    parity = json.loads((tmp_path / "parity.json").read_text())
    rows = [(row["subject"], row["output"]) for row in parity["comparisons"]]
    for pair in ("sg 0/0.5", "sg 0.25/0.5"):
        for output in ("strong branch", "weak branch", "guided"):
            assert rows.count((pair, output)) == 25
    runs = [row for row in parity["comparisons"] if row["output"] == "samples"]
    assert len(runs) == 2
    assert all("other kept tokens: " in row["subject"] and row["passed"] for row in runs)
    lines = [line.split() for line in result.stdout.splitlines()]
    strata = [words for words in lines if words[-1:] == ["pass"] and words[-2].endswith("%") and len(words) == 5]
    assert len(strata) == 50, "25 times for each pair"
    assert sum(line.startswith("25 euler steps, sg ") for line in result.stdout.splitlines()) == 2
