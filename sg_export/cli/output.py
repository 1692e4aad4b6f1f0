"""Output of commands: progress, warnings, tables."""

import io
import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from sg_export.progress import Report, silent

if TYPE_CHECKING:
    from rich.table import Table


def prepare_streams() -> None:
    """Make standard output and error take any text.

    A character that the encoding lacks becomes `?`. A stream that is closed discards what it gets.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _tell(message: str) -> None:
    """Print a message on standard error. If that cannot be written, the work goes on without it."""
    with suppress(OSError):
        click.echo(message, err=True)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yield a function that reports stages on standard error.

    On a terminal it draws a bar. Elsewhere it prints one line per stage. If `quiet`, it prints
    nothing.
    """
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)

            def show(stage: str, done: int, total: int | None, share: float | None = None) -> None:
                description = stage if share is None else f"{stage} {share:.0%}"
                bar.update(task, description=description, completed=done, total=total)

            yield show
    else:
        last = None

        def line(stage: str, done: int, total: int | None, share: float | None = None) -> None:
            nonlocal last
            if stage != last:
                _tell(stage if total is None else f"[{done + 1}/{total}] {stage}")
            last = stage

        yield line


OPTIONS = {
    "compute_capabilities": "--sm",
    "libraries": "--target",
    "onnx_target": "--target",
    "table": "--calibration",
    "data": "--calib-data",
    "samples": "--calib-samples",
    "steps": "--calib-steps",
    "seed": "--calib-seed",
}
"""Options whose names differ from the parameters of the Python API."""


def with_options(message: str) -> str:
    """Return a message of the library with options in place of the parameters, in backticks.

    A word after `weights` that is no set of weights is a key, and a library is a target.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2] or ""
        if name == "weights" and value.strip() not in ("ema", "model"):
            return f"--key{value}"
        shown = value.replace("_", "-") if name == "libraries" else value
        return OPTIONS.get(name, f"--{name.replace('_', '-')}") + shown

    return re.sub(r"`([a-z_]+)`( [\w.]+)?", option, message)


PACKAGES = ("sg_export", "sg_engines", "sg_runtime", "sg_calibration")


@contextmanager
def log_messages() -> Iterator[None]:
    """Print the log messages of all packages of the project on standard error.

    The level is printed in front of warnings and errors.
    """

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            _tell(f"{level}{with_options(record.getMessage())}")

    handler = Echo()
    logs = [logging.getLogger(name) for name in PACKAGES]
    for log in logs:
        log.addHandler(handler)
    try:
        yield
    finally:
        for log in logs:
            log.removeHandler(handler)


@contextmanager
def log_details(wanted: bool) -> Iterator[None]:
    """Make sg_export also log details, if `wanted`."""
    log = logging.getLogger("sg_export")
    level = log.level
    log.setLevel(logging.INFO if wanted else logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers are right-aligned, and no word of a cell is broken.

    If its words do not fit next to each other, rows and columns change places. If that does not
    fit either, each row is printed as its first cell, with lines of `column value` below. Only the
    last column of a table of two is broken if it must. If standard output is not a terminal, the
    width is 120 characters.
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    upright = [[column, *(cell(row[index]) for row in rows)] for index, column in enumerate(columns)]
    one_line = [[name.replace("\n", " "), *values] for name, *values in upright]
    for texts in (upright, [list(row) for row in zip(*one_line, strict=True)]):
        if (widths := _widths(texts, console.width)) is not None:
            console.print(_table(title, texts, widths))
            break
    else:
        click.echo(_records(title, one_line, console.width))
    click.echo()


def _table(title: str, texts: Sequence[Sequence[str]], widths: Sequence[int]) -> "Table":
    """Return a table of columns `texts`, each with its head first."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for (name, *values), width in zip(texts, widths, strict=True):
        numeric = bool(values) and all(map(_NUMBER.fullmatch, values))
        table.add_column(escape(name), justify="right" if numeric else "left", overflow="fold", width=width)
    for row in zip(*(values for _, *values in texts), strict=True):
        table.add_row(*map(escape, row))
    return table


_NUMBER = re.compile(r"-|nan|-?inf|[-+]?[\d.]+(e[-+]?\d+)?%?(/[\d.]+)?")
"""Text of a number or a pair of sparsities, or of one that is not there."""


def _widths(texts: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Return widths of columns of `texts` so that no word is broken; None if they do not fit.

    width: width of the table. Two characters are between columns.
    """
    least = [max((len(word) for text in column for word in text.split()), default=0) for column in texts]
    most = [max(len(line) for text in column for line in (text or " ").split("\n")) for column in texts]
    spare = width - sum(least) - 2 * (len(texts) - 1)
    if spare < 0:
        return [least[0], max(least[1] + spare, 1)] if len(texts) == 2 else None
    for index, wanted in enumerate(most):
        more = min(wanted - least[index], spare)
        least[index] += more
        spare -= more
    return least


def _records(title: str, texts: Sequence[Sequence[str]], width: int) -> str:
    """Return the rows of columns `texts`, each as its first cell and pairs `column value`."""
    wrap = textwrap.TextWrapper(
        width, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ).wrap
    (_, *firsts), *others = texts
    lines = [title] if title else []
    for number, first in enumerate(firsts, 1):
        lines += [first, *wrap(", ".join(f"{column[0]} {column[number]}" for column in others))]
    return "\n".join(lines)


def cell(value: object) -> str:
    """Return a value as table text: floats with four digits, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
