"""What commands print."""

import errno
import io
import logging
import math
import sys
from typing import Any

import click
import pytest

from sg_export.cli.output import cell, log_messages, print_table, progress, with_options


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report_twice(quiet: bool) -> None:
    with progress(quiet) as report:
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
    assert cell(value) == text


def test_print_table_aligns_numbers_and_keeps_long_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Things", ("name", "size"), [("a" * 30, 1.5), ("b", 1234567)])
    lines = capsys.readouterr().out.splitlines()
    assert any("Things" in line for line in lines)
    (first,) = (line for line in lines if "a" * 30 in line)
    (second,) = (line for line in lines if "1234567" in line)
    assert first.rstrip().endswith("    1.5")
    assert len(first.rstrip()) == len(second.rstrip())


@pytest.mark.parametrize("rows", [[], [("[bold]x", None)]])
def test_print_table_shows_values_as_they_are(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", ("name", "size"), rows)
    shown = capsys.readouterr().out
    assert "name" in shown
    assert all("[bold]x" in shown for _ in rows)


WIDE = ("graph", "linear\nGMAC", "attention\nGMAC", "weights\nMB", "activations\nMB", "L2 to PyTorch")
VALUES = (0.0002181, 1.475e-05, 1234567.25, 0.06492, 1.5e-07)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("width", [40, 60, 80])
def test_print_table_on_a_narrow_terminal_breaks_no_number_or_name(
    width: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("Layers", WIDE, [(f"blocks.{k}.adaLN_modulation.1", *VALUES) for k in range(rows)])
    shown = click.unstyle(terminal.getvalue())
    words = shown.replace(",", " ").split()
    for word in ("0.0002181", "1.475e-05", "1.235e+06", "1.5e-07", "activations"):
        assert word in words
    assert {f"blocks.{k}.adaLN_modulation.1" for k in range(rows)} <= set(words)
    assert max(map(len, shown.splitlines())) <= width


def test_print_table_that_does_not_fit_has_rows_as_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    print_table("", WIDE, [("sg", *VALUES), ("cfg", *VALUES)])
    lines = [line.split() for line in click.unstyle(terminal.getvalue()).splitlines()]
    assert ["graph", "sg", "cfg"] in lines
    assert ["weights", "MB", "1.235e+06", "1.235e+06"] in lines


def test_print_table_on_a_narrow_terminal_folds_a_long_path(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    print_table("", ("", "x" * 100), [("family", "tread")])
    shown = click.unstyle(terminal.getvalue())
    assert shown.count("x") == 100
    assert max(map(len, shown.splitlines())) <= 40
    assert ["family", "tread"] in [line.split() for line in shown.splitlines()]


class Broken(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_progress_on_a_stream_that_is_full_lets_the_work_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken())
    report_twice(quiet=False)
    with log_messages():
        logging.getLogger("sg_export").warning("not heard")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`heads`: expected 2; give `heads`", "--heads: expected 2; give --heads"),
        ("give `prediction` flow", "give --prediction flow"),
        ("give `weights` ema, or `weights` net.a", "give --weights ema, or --key net.a"),
        ("give one of them as `weights`", "give one of them as --key"),
        ("give `libraries` tensorrt_rtx, which", "give --target tensorrt-rtx, which"),
        ("more `samples`, or other `data`", "more --calib-samples, or other --calib-data"),
        ("output: exists: give another `output`, or `force`", "output: exists: give another --output, or --force"),
        ("see `Bundle.open(path)`", "see `Bundle.open(path)`"),
    ],
)
def test_with_options_names_options_in_place_of_parameters(message: str, shown: str) -> None:
    assert with_options(message) == shown


def test_log_messages_name_options(capsys: pytest.CaptureFixture[str]) -> None:
    with log_messages():
        logging.getLogger("sg_engines").warning("`timing_cache`: not used")
    assert capsys.readouterr().err == "warning: --timing-cache: not used\n"
