"""What the commands share: the message and exit code of every error, progress, and tables."""

import errno
import io
import math
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from sg_export.cli import options as base
from sg_runtime import errors
from sg_runtime.manifest import Route


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (errors.UsageError("a"), 2, "a"),
        (errors.MissingExtraError("a"), 2, "a"),
        (errors.ExportError("a"), 3, "a"),
        (errors.EngineError("a"), 4, "a"),
        (errors.GateError("a"), 5, "a"),
        (errors.BundleError("a"), 6, "a"),
        (errors.CheckpointError("a"), 6, "a"),
        (
            ModuleNotFoundError("no", name="onnx"),
            2,
            "onnx is not installed: pip install 'sg-export[export]'",
        ),
        (OSError(errno.ENOSPC, "full", "a.png"), 1, "the disk is full; free some space, or write to another disk"),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), 2, "a.png: Permission denied"),
        (ValueError("a"), 1, "unexpected ValueError: a; run again with --debug, and please report it"),
        (
            ModuleNotFoundError("no", name="own"),
            1,
            "unexpected ModuleNotFoundError: no; run again with --debug",
        ),
        (OSError("a"), 1, "unexpected OSError: a; run again with --debug, and please report it"),
    ],
)
def test_failure_of_each_kind_has_its_exit_code(error: Exception, exit_code: int, message: str) -> None:
    found = base.failure(error)
    assert found.exit_code == exit_code
    assert found.message.startswith(message)


def command_that_raises(error: BaseException) -> click.Command:
    @click.command(cls=base.Command)
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "exit_code", "output"),
    [
        (KeyboardInterrupt(), 130, "Error: interrupted; nothing was left half-written\n"),
        (ValueError("a"), 1, "Error: unexpected ValueError: a; run again with --debug, and please report it\n"),
        (base.Failure("a", 5), 5, "Error: a\n"),
        (click.Abort(), 1, "Aborted!\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_invoke_of_a_command_that_fails_ends_with_one_message(
    error: BaseException, exit_code: int, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):  # click replaces both by a wrapper when a reader has gone
        monkeypatch.setattr(sys, name, getattr(sys, name))
    result = CliRunner().invoke(command_that_raises(error))
    assert (result.exit_code, result.output) == (exit_code, output)


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (OSError(errno.ENOSPC, "full", ".out.partial"), 1, "out: the disk is full; free some space, or "),
        (OSError(errno.EROFS, "read-only", ".out.partial"), 2, "out: cannot be written (read-only): give another"),
        (OSError("encoder error -2"), 2, "out: cannot be written (encoder error -2): give another --output"),
    ],
)
def test_writing_that_fails_names_the_users_path(error: OSError, exit_code: int, message: str) -> None:
    with pytest.raises(base.Failure) as caught, base.writing(Path("out")):
        raise error
    assert caught.value.exit_code == exit_code
    assert caught.value.message.startswith(message)


def test_route_type_reads_text_and_leaves_routes() -> None:
    kind = base.RouteType()
    assert kind.convert("2-24", None, None) == Route(2, 24)
    assert kind.convert(Route(1, 2), None, None) == Route(1, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2.0),
        ("-1.5", -1.5),
        ("3:1.5", (3.0, 1.5)),
        ("0:0.5", (0.0, 0.5)),
        (" 2 : 1 ", (2.0, 1.0)),
        ("inf", math.inf),
    ],
)
def test_ramp_type_reads_one_number_or_two(text: str, value: Any) -> None:
    assert base.RampType().convert(text, None, None) == value


@pytest.mark.parametrize("text", ["", "x", "1:2:3", "1:", ":1", ":", "1,2", "1-2"])
def test_ramp_type_of_other_text_says_how(text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        base.RampType().convert(text, None, None)
    assert caught.value.message == f"{text!r}: expected a number, or two as FIRST:LAST"


@pytest.mark.parametrize("value", [2.0, (3.0, 1.5)])
def test_ramp_type_leaves_what_is_read(value: Any) -> None:
    assert base.RampType().convert(value, None, None) == value


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report_twice(quiet: bool) -> None:
    with base.progress(quiet) as report:
        report("loading", 0, None)
        report("tracing", 0, 2)
        report("tracing", 0, 2)
        report("checking", 1, 2)


def test_progress_elsewhere_than_a_terminal_is_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    report_twice(quiet=False)
    assert capsys.readouterr() == ("", "loading\n[1/2] tracing\n[2/2] checking\n")


def test_progress_if_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    report_twice(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    report_twice(quiet=False)
    shown = terminal.getvalue()
    assert "checking" in shown
    assert "1/2" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1.2345e-4, "0.0001234"), (1.0, "1"), (12, "12"), ("a", "a"), (math.nan, "nan")],
)
def test_cell_of_each_kind_is_short(value: object, text: str) -> None:
    assert base.cell(value) == text


def test_print_table_aligns_numbers_and_keeps_long_text(capsys: pytest.CaptureFixture[str]) -> None:
    base.print_table("Things", ("name", "size"), [("a" * 30, 1.5), ("b", 1234567)])
    lines = capsys.readouterr().out.splitlines()
    assert any("Things" in line for line in lines)
    (first,) = (line for line in lines if "a" * 30 in line)
    (second,) = (line for line in lines if "1234567" in line)
    assert first.rstrip().endswith("    1.5")
    assert len(first.rstrip()) == len(second.rstrip())


@pytest.mark.parametrize("rows", [[], [("[bold]x", None)]])
def test_print_table_shows_values_as_they_are(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    base.print_table("", ("name", "size"), rows)
    shown = capsys.readouterr().out
    assert "name" in shown
    assert all("[bold]x" in shown for _ in rows)
