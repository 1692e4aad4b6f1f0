"""Errors of commands: each ends as one message with the exit code of its kind."""

import errno
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import click

from sg_export.cli.output import log_messages, with_options
from sg_runtime.errors import SgError
from sg_runtime.extras import install_command, outdated
from sg_runtime.files import FULL, check_room, is_full
from sg_runtime.manifest.model import DASHES


class Failure(click.ClickException):
    """A message for the user, with the exit code of its kind."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click documents it per class, and reads it per instance

    def show(self, file: IO[Any] | None = None) -> None:
        with suppress(OSError):  # the terminal is gone
            super().show(file)


class Ended(KeyboardInterrupt):
    """A signal that ends the process politely. It unwinds a command as Ctrl-C does.

    number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def ending_politely() -> Iterator[None]:
    """Raise Ended in the block for SIGTERM and SIGHUP, so that temporary files are removed.

    A signal that the process ignores, as under nohup, stays ignored. Further signals do not disturb
    the removal.
    """
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        taken = []  # only the main thread may handle signals

    def end(number: int, frame: object) -> None:
        for other in taken:
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


class Command(click.Command):
    """A command whose errors end as one message. `--debug` shows the traceback.

    sections: names of parameters by the heading above them in the help. The others come last.
    """

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]] | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sections = sections or {}
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the Python traceback of an error."))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        found = {option.name: option.get_help_record(ctx) for option in options}
        helps = {name: record for name, record in found.items() if record is not None}
        sections = {title: [helps.pop(name) for name in names] for title, names in self.sections.items()}
        for title, records in {**sections, "Options": list(helps.values())}.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an option whose dashes a text processor replaced, with its name."""
        known = {name for option in self.get_params(ctx) for name in option.opts}
        for word in args:
            given = word.partition("=")[0]
            name = given.lstrip(DASHES)
            if given.removesuffix(name).strip("-") and (option := f"--{name}") in known:
                raise click.UsageError(f"{given}: begins with other dashes than -: give {option}", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, context: click.Context) -> Any:
        debug = context.params.pop("debug")
        try:
            with ending_politely(), log_messages():
                return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            name, number = "interrupted", signal.SIGINT.value
            if isinstance(error, Ended):
                name, number = f"ended by {signal.Signals(error.number).name}", error.number
            raise Failure(f"{name}; nothing was left half-written", 128 + number) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            ended = failure(error)
            # A library that is too old is the likely cause, whatever it led to.
            raise Failure("\n".join([ended.message, *outdated()]), ended.exit_code) from error


def failure(error: Exception) -> Failure:
    """Return the message and the exit code of an error."""
    if isinstance(error, SgError):
        return Failure(with_options(str(error)), error.exit_code)
    if isinstance(error, ModuleNotFoundError) and (command := install_command(error.name or "")) is not None:
        return Failure(f"{error.name} is not installed: {command}", 2)
    if isinstance(error, OSError) and error.errno in FULL:
        where = "" if error.filename is None else f"{error.filename}: "
        return Failure(f"{where}the disk is full; free some space, or write to another disk", 1)
    if isinstance(error, OSError) and error.filename is not None:
        return Failure(f"{error.filename}: {error.strerror}", 2)
    return Failure(f"unexpected {type(error).__name__}: {error}; run again with --debug, and please report it", 1)


@contextmanager
def writing(path: Path, option: str = "--output") -> Iterator[None]:
    """Turn an error on `path`, or on a temporary file next to it, into a message about `path`.

    option: the option that chooses `path`. An error of another file names that file.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(error, path.absolute()):
            raise
        if error.errno in FULL or (error.errno is None and is_full(path.absolute().parent)):
            raise Failure(f"{path}: the disk is full; free some space, or give {option} on another disk", 1) from error
        raise Failure(f"{path}: cannot be written ({error.strerror or error}): give another {option}", 2) from error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error is of a file next to `path`, or in a folder that `path` would be in."""
    if not isinstance(error.filename, str):
        return True
    named = Path(error.filename).absolute()
    return named.is_relative_to(path.parent) or path.is_relative_to(named.parent)


def check_output_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise Failure if a command cannot write its results to `path`, before it does any work.

    inputs: files that the command reads, which `path` may not replace.
    """
    if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
        raise Failure(f"{path}: is an input of this command: give another --output", 2)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.exists() and not path.is_file():
            raise Failure(f"{path}: expected a file, found a device: give another --output", 2)
        if not path.absolute().parent.is_dir():
            raise Failure(f"{path}: cannot be written: found no folder {path.absolute().parent}: make it first", 2)
        check_room(path.absolute().parent)


def check_output_folder(path: Path, option: str) -> None:
    """Raise Failure if a command cannot write to the folder `path`, before it does any work.

    option: the option that chooses `path`.
    """
    with writing(path, option):
        check_room(path)
