"""Output of commands: progress, warnings, tables."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from sg_export.progress import Report, silent


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
                click.echo(stage if total is None else f"[{done + 1}/{total}] {stage}", err=True)
            last = stage

        yield line


@contextmanager
def log_messages() -> Iterator[None]:
    """Print the log messages of sg_export and sg_runtime on standard error.

    The level is printed in front of warnings and errors.
    """

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            click.echo(f"{level}{record.getMessage()}", err=True)

    handler = Echo()
    logs = [logging.getLogger(name) for name in ("sg_export", "sg_runtime")]
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
    """Print a table; columns of numbers are right-aligned.

    If standard output is not a terminal, the table is 120 characters wide.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def cell(value: object) -> str:
    """Return a value as table text: floats with four digits, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
