"""Parts that the commands share: messages and exit codes of errors, progress, and tables."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sg_export.cli.errors import Command, Failure, failure, writing
from sg_runtime import errors


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
            "onnx is not installed: pip install -e '.[export]' in a checkout of sg-export",
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
    found = failure(error)
    assert found.exit_code == exit_code
    assert found.message.startswith(message)


def command_that_raises(error: BaseException) -> click.Command:
    @click.command(cls=Command)
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "exit_code", "output"),
    [
        (KeyboardInterrupt(), 130, "Error: interrupted; nothing was left half-written\n"),
        (ValueError("a"), 1, "Error: unexpected ValueError: a; run again with --debug, and please report it\n"),
        (Failure("a", 5), 5, "Error: a\n"),
        (click.Abort(), 1, "Aborted!\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_invoke_of_a_command_that_fails_ends_with_one_message(
    error: BaseException, exit_code: int, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):  # click wraps both streams if a reader is gone
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
    with pytest.raises(Failure) as caught, writing(Path("out")):
        raise error
    assert caught.value.exit_code == exit_code
    assert caught.value.message.startswith(message)


def test_command_that_fails_beside_an_old_library_names_its_version(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sg_export.cli.errors.outdated", lambda: ["onnx-ir 0.1.9 is older than 0.1.16"])
    message = refused(6, "inspect", tmp_path / "missing.pt")
    assert message.splitlines()[1:] == ["onnx-ir 0.1.9 is older than 0.1.16"]
