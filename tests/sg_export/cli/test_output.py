"""What commands print."""

import io
import math
import sys
from typing import Any

import pytest

from sg_export.cli.output import cell, print_table, progress


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
