"""Errors of commands: each ends as one message with the exit code of its kind."""

import errno
import re
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sg_export.cli.output import log_messages
from sg_runtime.errors import OptionError, SgError
from sg_runtime.extras import install_command, outdated


class Failure(click.ClickException):
    """A message for the user, with the exit code of its kind."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click documents it per class, and reads it per instance


class Command(click.Command):
    """A command whose errors end as one message. `--debug` shows the traceback."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the Python traceback of an error."))

    def invoke(self, context: click.Context) -> Any:
        debug = context.params.pop("debug")
        try:
            with log_messages():
                return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise Failure("interrupted; nothing was left half-written", 130) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            ended = failure(error)
            # A library that is too old is the likely cause, whatever it led to.
            raise Failure("\n".join([ended.message, *outdated()]), ended.exit_code) from error


def failure(error: Exception) -> Failure:
    """Return the message and the exit code of an error."""
    if isinstance(error, OptionError):
        return Failure(with_options(str(error), error.fields), error.exit_code)
    if isinstance(error, SgError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, ModuleNotFoundError) and (command := install_command(error.name or "")) is not None:
        return Failure(f"{error.name} is not installed: {command}", 2)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Failure("the disk is full; free some space, or write to another disk", 1)
    if isinstance(error, OSError) and error.filename is not None:
        return Failure(f"{error.filename}: {error.strerror}", 2)
    return Failure(f"unexpected {type(error).__name__}: {error}; run again with --debug, and please report it", 1)


OPTIONS = {
    "compute_capabilities": "--sm",
    "table": "--calibration",
    "data": "--calib-data",
    "samples": "--calib-samples",
    "steps": "--calib-steps",
    "seed": "--calib-seed",
}
"""Options whose names differ from the fields of the Python API."""


def with_options(message: str, fields: Collection[str]) -> str:
    """Return a message with the command line's options in place of these fields."""
    for field in fields:
        option = OPTIONS.get(field, f"--{field.replace('_', '-')}")
        message = re.sub(rf"(?<![\w-]){field}(?=[ :,])", option, message)
    return message


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error on a temporary file next to `path` into a message about `path` itself."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Failure(
                f"{path}: the disk is full; free some space, or give an --output on another disk", 1
            ) from error
        raise Failure(f"{path}: cannot be written ({error.strerror or error}): give another --output", 2) from error
