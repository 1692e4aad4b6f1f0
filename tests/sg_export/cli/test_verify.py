"""`sg-export verify`."""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polygraphy.json import load_json

from sg_runtime.bundle import Bundle
from sg_runtime.files import sha256_of
from sg_runtime.manifest import FileFacts, write_manifest


@pytest.fixture
def bundle(fixed_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, next to its checkpoint."""
    shutil.copy(tiny_checkpoint, tmp_path)
    return Path(shutil.copytree(fixed_bundle, tmp_path / "bundle"))


def alter_weights(bundle: Path, factor: float) -> None:
    """Scale all weights, and update the manifest to match."""
    weights = bundle / "graphs/weights.bin"
    weights.write_bytes((np.fromfile(weights, np.float32) * np.float32(factor)).tobytes())
    manifest = Bundle.open(bundle, verify_hashes=False).manifest
    facts = FileFacts(weights.stat().st_size, sha256_of(weights))
    write_manifest(replace(manifest, files={**manifest.files, "graphs/weights.bin": facts}), bundle / "manifest.json")


def test_verify_prints_a_table_and_writes_the_results(cli: Callable[..., Any], bundle: Path) -> None:
    result = cli("verify", bundle)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("[1/10] comparing condition\n[2/10] comparing sparse-12\n")
    content = json.loads((bundle / "verify.json").read_text())
    assert content["passed"] is True
    # Four graphs at eight times, three of them with two outputs. Runs of two samplers: in one
    # graph, in two graphs and without guidance. A row of the table shows the worst output.
    assert len(content["comparisons"]) == (1 + 3 * 2) * 8 + 2 * 3
    assert result.stdout.count("pass") == 4 * 8 + 2 * 3
    assert "gates, relative L2: 1e-05 for a graph, 0.0001 for a complete run" in result.stdout
    assert result.stdout.endswith(f"results: {bundle}/verify.json\n")
    for word in (
        "graph or run",
        "worst output",
        "max abs",
        "relative L2",
        "cosine",
        "verdict",
        "guided-12-8",
        "0.98",
        "10 heun steps",
    ):
        assert word in result.stdout
    # A bundle that holds results is still a bundle.
    Bundle.open(bundle)


def test_verify_with_output_leaves_the_bundle_alone(
    cli: Callable[..., Any], fixed_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = cli("verify", fixed_bundle, "--checkpoint", tiny_checkpoint, "-o", tmp_path / "parity.json", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "parity.json").is_file()
    assert sorted(path.name for path in fixed_bundle.iterdir()) == ["graphs", "manifest.json"]


def test_verify_of_altered_weights_ends_with_5_and_names_the_worst(
    cli: Callable[..., Any], refused: Callable[..., str], bundle: Path
) -> None:
    alter_weights(bundle, 1.005)
    message = refused(5, "verify", bundle)
    content = json.loads((bundle / "verify.json").read_text())
    assert content["passed"] is False
    failed = [comparison for comparison in content["comparisons"] if not comparison["passed"]]
    worst = max(failed, key=lambda comparison: comparison["relative_l2"] / comparison["gate"])
    assert message == (
        f"{bundle}: {len(failed)} of 62 comparisons fail; the worst, {worst['subject']}: expected relative L2 at most "
        f"{worst['gate']:g}, found {worst['relative_l2']:g}; build the bundle again"
    )
    rows = {(comparison["subject"], comparison["time"]) for comparison in failed}
    assert cli("verify", bundle).stdout.count("FAIL") == len(rows)


def test_verify_of_weights_that_are_no_numbers_ends_with_5(refused: Callable[..., str], bundle: Path) -> None:
    alter_weights(bundle, math.nan)
    message = refused(5, "verify", bundle)
    assert message.startswith(f"{bundle}: 62 of 62 comparisons fail; the worst, condition: ")
    assert "found nan; build the bundle again" in message


def test_verify_of_another_checkpoint_ends_with_6(refused: Callable[..., str], bundle: Path, tiny: Any) -> None:
    tiny.save(bundle.parent / "tiny.safetensors", tiny.state(seed=2))
    assert "expected SHA-256 " in refused(6, "verify", bundle)
    assert not (bundle / "verify.json").exists()


def test_verify_without_checkpoint_ends_with_6(refused: Callable[..., str], bundle: Path) -> None:
    (bundle.parent / "tiny.safetensors").unlink()
    assert refused(6, "verify", bundle) == (
        f"{bundle}: its checkpoint tiny.safetensors is neither next to the bundle nor in the current folder: "
        f"give --checkpoint"
    )
    missing = bundle.parent / "missing.pt"
    assert refused(6, "verify", bundle, "--checkpoint", missing) == (
        f"{missing}: expected the checkpoint of {bundle}, tiny.safetensors, found nothing there"
    )


@pytest.fixture
def two_networks(tiny_autoguidance_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle with two networks, next to its checkpoints."""
    for name in ("tiny.safetensors", "tiny-weak.safetensors"):
        shutil.copy(tiny_autoguidance_bundle.parent / name, tmp_path)
    return Path(shutil.copytree(tiny_autoguidance_bundle, tmp_path / "bundle"))


def test_verify_without_weak_checkpoint_ends_with_6(refused: Callable[..., str], two_networks: Path) -> None:
    moved = two_networks.with_name("elsewhere.safetensors")
    two_networks.with_name("tiny-weak.safetensors").rename(moved)
    assert refused(6, "verify", two_networks) == (
        f"{two_networks}: its checkpoint tiny-weak.safetensors is neither next to the bundle nor in the current "
        f"folder: give --weak-checkpoint"
    )
    missing = two_networks.with_name("missing.pt")
    assert refused(6, "verify", two_networks, "--weak-checkpoint", missing) == (
        f"{missing}: expected the checkpoint of {two_networks}, tiny-weak.safetensors, found nothing there"
    )


def test_verify_of_altered_weak_checkpoint_ends_with_6(
    refused: Callable[..., str], two_networks: Path, tiny: Any
) -> None:
    tiny.save(two_networks.with_name("tiny-weak.safetensors"), tiny.state(seed=3))
    assert "tiny-weak.safetensors: expected SHA-256 " in refused(6, "verify", two_networks)
    assert not (two_networks / "verify.json").exists()


def test_verify_with_weak_checkpoint_that_it_has_no_use_for_ends_with_2(
    refused: Callable[..., str], bundle: Path, tiny_checkpoint: Path
) -> None:
    assert refused(2, "verify", bundle, "--weak-checkpoint", tiny_checkpoint) == (
        f"{bundle}: has no weak network: leave out --weak-checkpoint"
    )


def test_verify_of_a_damaged_bundle_ends_with_6(refused: Callable[..., str], bundle: Path) -> None:
    with (bundle / "graphs/weights.bin").open("r+b") as stream:
        stream.write(b"\1\2\3\4")
    assert "file graphs/weights.bin: expected SHA-256" in refused(6, "verify", bundle)


def test_verify_to_a_file_that_it_reads_is_refused(
    refused: Callable[..., str], bundle: Path, tiny_checkpoint: Path
) -> None:
    for path in (bundle / "manifest.json", bundle / "graphs/weights.bin", tiny_checkpoint):
        message = refused(2, "verify", bundle, "--checkpoint", tiny_checkpoint, "-o", path)
        assert message == f"{path}: is an input of this command: give another --output"


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny-weak.safetensors"])
def test_verify_to_the_checkpoint_that_it_finds_by_name_is_refused(
    name: str, refused: Callable[..., str], tiny_autoguidance_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "bundle").symlink_to(tiny_autoguidance_bundle)
    path = tmp_path / name
    path.write_bytes(b"not to be lost")
    message = refused(2, "verify", tmp_path / "bundle", "-o", path)
    assert message == f"{path}: is an input of this command: give another --output"
    assert path.read_bytes() == b"not to be lost"


def test_verify_of_a_bundle_of_links_passes(cli: Callable[..., Any], bundle: Path, tmp_path: Path) -> None:
    """A cache of Hugging Face holds links to files with other names."""
    snapshot = tmp_path / "cache/snapshots/0123abc"
    (tmp_path / "cache/blobs").mkdir(parents=True)
    files = [file for file in bundle.rglob("*") if file.is_file()]
    for number, file in enumerate(files):
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(shutil.copy(file, tmp_path / f"cache/blobs/{number}"), link.parent))
    given = ("--checkpoint", bundle.parent / "tiny.safetensors", "-o", tmp_path / "verify.json")
    result = cli("verify", snapshot, *given)
    assert result.exit_code == 0, result.output


def test_verify_without_room_for_its_folder_of_data_is_refused(
    refused: Callable[..., str], bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file/parity"
    assert refused(2, "verify", bundle, "--save-polygraphy", folder) == (
        f"{folder}: cannot be written (Not a directory): give another --save-polygraphy"
    )


def test_verify_of_a_bundle_that_takes_no_file_passes_and_says_so(cli: Callable[..., Any], bundle: Path) -> None:
    (bundle / "verify.json").mkdir()  # stands for a read-only disk
    result = cli("verify", bundle)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(
        f"results are not written: {bundle}/verify.json: cannot be written (Is a directory): give another --output\n"
    )


@pytest.mark.slow
def test_verify_of_a_read_only_bundle_passes_and_says_that_results_are_not_written(
    mounted: Callable[..., Any], bundle: Path
) -> None:
    result = mounted(f"--bind -o ro {bundle.parent}", "verify", "disk/bundle")
    assert result.returncode == 0, result.stderr
    assert (
        "results are not written: disk/bundle/verify.json: cannot be written (Read-only file system)" in result.stdout
    )


@pytest.fixture(scope="module")
def saved(tiny_cfg_sg_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which verify saved its data, and the commands that verify printed.

    The name of the folder needs quotes.
    """
    from click.testing import CliRunner

    from sg_export.cli import main

    folder = tmp_path_factory.mktemp("parity") / "saved here"
    words = ["verify", tiny_cfg_sg_bundle, "--save-polygraphy", folder, "-o", folder.parent / "verify.json"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return folder, [line for line in result.stdout.splitlines() if line.startswith("polygraphy run ")]


def shell(command: str, environment: dict[str, str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def printed_commands(cli: Callable[..., Any], bundle: Path, tmp_path: Path) -> list[str]:
    """Return the commands that verify prints if it saves its data for Polygraphy."""
    words = ("--save-polygraphy", tmp_path / "parity", "-o", tmp_path / "verify.json")
    result = cli("verify", bundle, *words)
    assert result.exit_code == 0, result.output
    return [line for line in result.stdout.splitlines() if line.startswith("polygraphy run ")]


def test_verify_save_polygraphy_leaves_a_pair_of_files_for_every_graph(
    saved: tuple[Path, list[str]], tiny_cfg_sg_bundle: Path
) -> None:
    folder, commands = saved
    names = [graph.name for graph in Bundle.open(tiny_cfg_sg_bundle).manifest.graphs]
    assert len(commands) == len(names) == 4
    files = {f"{name}-{part}.json" for name in names for part in ("inputs", "outputs")}
    assert {path.name for path in folder.iterdir()} == files


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_verify_printed_polygraphy_command_passes(
    number: int, saved: tuple[Path, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    result = shell(saved[1][number], environment, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED" in result.stdout
    assert "Passed: 8/8 iterations" in result.stdout


@pytest.mark.slow
def test_verify_printed_polygraphy_command_of_a_weak_graph_passes(
    cli: Callable[..., Any], tiny_autoguidance_bundle: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    commands = printed_commands(cli, tiny_autoguidance_bundle, tmp_path)
    (command,) = (line for line in commands if "weak-sparse-8.onnx" in line)
    done = shell(command, environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 8/8 iterations" in done.stdout


@pytest.mark.slow
def test_verify_of_a_quantized_bundle_leaves_states_of_guided_runs_for_polygraphy(
    cli: Callable[..., Any], tiny_int8_bundle: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    commands = printed_commands(cli, tiny_int8_bundle, tmp_path)
    runs = [len(load_json(str(path))) for path in sorted((tmp_path / "parity").glob("*-inputs.json"))]
    assert (len(commands), runs) == (3, [8, 9, 9])
    done = shell(commands[-1], environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed: 9/9 iterations" in done.stdout
    strict = commands[-1].replace("threshold 0.5", "threshold 0.99999999")
    assert strict != commands[-1]
    assert shell(strict, environment, tmp_path).returncode != 0


def test_verify_printed_polygraphy_command_fails_on_other_outputs(
    saved: tuple[Path, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    from polygraphy.comparator import RunResults

    folder, commands = saved
    (command,) = (line for line in commands if "sparse-8.onnx" in line)
    results = RunResults.load(str(folder / "sparse-8-outputs.json"))
    (_, iterations), *_ = results
    # One value of the last run changes by ten times the tolerance of the printed command.
    changed = iterations[-1]["prediction"].copy()
    changed.flat[5] += 10 * (1e-4 + 1e-4 * abs(changed.flat[5]))
    iterations[-1]["prediction"] = changed
    results.save(str(tmp_path / "changed.json"))
    perturbed = command.replace(f"'{folder}/sparse-8-outputs.json'", str(tmp_path / "changed.json"))
    assert perturbed != command
    result = shell(perturbed, environment, tmp_path)
    assert result.returncode != 0
    assert "FAILED" in result.stdout
