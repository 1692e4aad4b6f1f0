"""Parts that the commands share: messages and exit codes of errors, progress, and tables."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sg_export.cli import main
from sg_export.cli.errors import Command, Ended, Failure, ending_politely, failure, writing
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
        (OSError(errno.ENOSPC, "full"), 1, "the disk is full; free some space, or write to another disk"),
        (
            OSError(errno.EDQUOT, "quota", "a.png"),
            1,
            "a.png: the disk is full; free some space, or write to another disk",
        ),
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
        (Ended(signal.SIGTERM), 143, "Error: ended by SIGTERM; nothing was left half-written\n"),
        (Ended(signal.SIGHUP), 129, "Error: ended by SIGHUP; nothing was left half-written\n"),
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ending_politely_raises_once(number: int) -> None:
    """The second signal comes while the block cleans up after the first."""
    with ExitStack() as cleaning:
        cleaning.enter_context(ending_politely())
        cleaned = cleaning.enter_context(pytest.raises(Ended))
        for other in (signal.SIGTERM, signal.SIGHUP):
            cleaning.callback(signal.raise_signal, other)
        signal.raise_signal(number)
    assert cleaned.value.number == number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_ending_politely_leaves_an_ignored_signal_ignored() -> None:
    """Programs under nohup start so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_politely():
            signal.raise_signal(signal.SIGHUP)
    finally:
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_show_on_a_terminal_that_is_gone_raises_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    Failure("a", 1).show(Gone())


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (OSError(errno.ENOSPC, "full", ".out.partial"), 1, "out: the disk is full; free some space, or "),
        (OSError(errno.EROFS, "read-only", ".out.partial"), 2, "out: cannot be written (read-only): give another"),
        (OSError(errno.EDQUOT, "quota"), 1, "out: the disk is full; free some space, or "),
        (OSError("encoder error -2"), 2, "out: cannot be written (encoder error -2): give another --output"),
    ],
)
def test_writing_that_fails_names_the_users_path(error: OSError, exit_code: int, message: str) -> None:
    with pytest.raises(Failure) as caught, writing(Path("out")):
        raise error
    assert caught.value.exit_code == exit_code
    assert caught.value.message.startswith(message)


def test_writing_that_fails_without_a_reason_asks_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sg_export.cli.errors.is_full", lambda folder: folder == Path("out").absolute().parent)
    with pytest.raises(Failure, match="out: the disk is full; free some space"), writing(Path("out")):
        raise OSError("problem writing element 23552 to file")


def test_writing_of_an_error_elsewhere_leaves_it(tmp_path: Path) -> None:
    """An error about another file must not be blamed on the output."""
    with pytest.raises(PermissionError), writing(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/last.pt")


@pytest.mark.parametrize("words", [("generate",), ("report",), ("verify",), ("calibrate", "--calib-samples", 1)])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder.png", "cannot be written (Is a directory): give another --output"),
        ("none/a.png", "cannot be written: found no folder {}/none: make it first"),
        ("file/a.png", "cannot be written: found no folder {}/file: make it first"),
        ("pipe.png", "expected a file, found a device: give another --output"),
    ],
)
def test_commands_refuse_an_impossible_output_before_they_read_anything(
    words: tuple[str, ...], output: str, message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    found = refused(2, words[0], tmp_path / "missing", *words[1:], "-o", tmp_path / output)
    assert found == f"{tmp_path / output}: {message.format(tmp_path)}"


def test_command_that_fails_beside_an_old_library_names_its_version(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sg_export.cli.errors.outdated", lambda: ["onnx-ir 0.1.9 is older than 0.1.16"])
    message = refused(6, "inspect", tmp_path / "missing.pt")
    assert message.splitlines()[1:] == ["onnx-ir 0.1.9 is older than 0.1.16"]


@pytest.mark.parametrize("given", ["–route", "—route", "–-route", "-–route", "—route=2-24"])
def test_command_given_an_option_with_other_dashes_names_it(given: str) -> None:
    result = CliRunner().invoke(main, ["inspect", "glyphs", given, "2-24"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: {given.removesuffix('=2-24')}: begins with other dashes than -: give --route"
    )


@pytest.mark.parametrize("value", ["–", "—B", "-route"])
def test_command_takes_dashes_in_values(value: str) -> None:
    assert "dashes" not in CliRunner().invoke(main, ["generate", "none", "--class", value, "-o", "a.png"]).stderr
