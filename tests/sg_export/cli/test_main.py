"""The entire command line: help, exit codes, tracebacks, and libraries that are not installed."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from sg_export.cli import main
from sg_runtime import __version__
from sg_runtime.extras import install_extra

COMMANDS = [
    "build",
    "calibrate",
    "generate",
    "sample",
    "inspect",
    "verify",
    "bench",
    "report",
    "serve",
    "triton",
    "doctor",
]


def test_main_has_the_commands() -> None:
    assert list(main.commands) == COMMANDS


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_main_help_shows_where_to_start_and_the_exit_codes(option: str, cli: Callable[..., Any]) -> None:
    result = cli(option)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    for text in (*COMMANDS, "sg-export build --sparsity 0.5 -o glyphs-bundle", "Exit codes: 0 done", "130 interrupted"):
        assert text in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_main_help_of_each_command_has_an_example_and_all_options(name: str, cli: Callable[..., Any]) -> None:
    result = cli(name, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"  sg-export {name}" in result.stdout
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.stdout


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_main_help_fits_80_columns(name: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli(*name.split(), "--help").stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("name", ["build", "calibrate", "generate"])
def test_main_help_of_many_options_has_headings_and_each_option_once(name: str, cli: Callable[..., Any]) -> None:
    lines = cli(name, "--help").stdout.splitlines()
    headings = [line for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    assert len(headings) >= 4
    assert headings[-1] == "Options:"
    shown = [match[1] for line in lines if (match := re.match(r"  (?:-\w, )?(--[a-z-]+)", line))]
    options = [parameter.opts[0] for parameter in main.commands[name].params if isinstance(parameter, click.Option)]
    assert sorted(shown) == sorted([*options, "--help"])


def test_main_as_a_module_shows_help(environment: dict[str, str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sg_export", "--help"]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: sg-export [OPTIONS] COMMAND [ARGS]...")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_main_prints_in_every_encoding(
    encoding: str, environment: dict[str, str], tiny_bundle: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "sg_export", "inspect", str(tiny_bundle)]
    own = environment | {"PYTHONIOENCODING": encoding}
    result = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "16 tokens, patch 2" in result.stdout.decode(encoding)


@pytest.mark.parametrize(
    ("streams", "exit_code", "told"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 1, "Error: standard output or error: No space left on device\n"),
        (">/dev/full 2>/dev/full", 1, ""),
    ],
)
def test_main_without_a_stream_ends_without_a_traceback(
    streams: str, exit_code: int, told: str, environment: dict[str, str], tmp_path: Path
) -> None:
    command = f"{shlex.quote(sys.executable)} -m sg_export --help {streams}"
    result = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (exit_code, told)


def test_main_version_is_that_of_the_package(cli: Callable[..., Any]) -> None:
    assert cli("--version").stdout == f"sg-export, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-command"], "No such command 'no-such-command'."),
        (["build", "--no-such-option"], "No such option '--no-such-option'."),
        (["generate"], "Missing argument 'BUNDLE'."),
        (["generate", "bundle"], "Missing option '--output' / '-o'."),
    ],
)
def test_main_of_a_wrong_command_line_ends_with_2(
    arguments: list[str], message: str, refused: Callable[..., str]
) -> None:
    assert refused(2, *arguments) == message


def test_main_debug_shows_the_traceback_and_keeps_the_exit_code(cli: Callable[..., Any], tmp_path: Path) -> None:
    plain = cli("inspect", tmp_path / "missing.pt")
    debug = cli("inspect", tmp_path / "missing.pt", "--debug")
    assert (plain.exit_code, debug.exit_code) == (6, 6)
    assert "Traceback" not in plain.output
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert "sg_runtime.errors.CheckpointError: " in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "blocked", "extra"),
    [
        (["build"], "torch", "export"),
        (["build"], "onnx", "export"),
        (["inspect", "glyphs"], "safetensors", "export"),
        (["generate", "BUNDLE", "-o", "a.png"], "onnxruntime", "ort"),
        (["verify", "BUNDLE"], "onnxruntime", "ort"),
        (["verify", "BUNDLE"], "polygraphy", "verify"),
    ],
)
def test_main_without_a_library_names_the_extra(
    arguments: list[str], blocked: str, extra: str, process: Callable[..., Any], glyphs_bundle: Path, tmp_path: Path
) -> None:
    words = [str(glyphs_bundle) if word == "BUNDLE" else word for word in arguments]
    result = process(*words, blocked=[blocked])
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == f"Error: {blocked} is not installed: {install_extra(extra)}"
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_main_without_the_compilers_libraries_runs_bundles(
    process: Callable[..., Any], glyphs_bundle: Path, tmp_path: Path
) -> None:
    blocked = ["torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "polygraphy"]
    result = process("generate", glyphs_bundle, "--count", "1", "--steps", "1", "-o", "a.png", blocked=blocked)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").is_file()
    result = process("inspect", glyphs_bundle, blocked=blocked)
    assert result.returncode == 0, result.stderr
    assert "guided-64-32" in result.stdout
