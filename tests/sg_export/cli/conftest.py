"""Run the command line in this process, in another process, and on a disk of a given size."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sg_export.cli import main

ROOT = Path(__file__).parents[3]
ROOMS = [str(ROOT / folder) for folder in (".", "engines", "runtime", "calibration")]

LIMIT = 300
"""Time limit of a process in seconds: an endless wait would block all tests."""

Run = Callable[..., Result]
Refused = Callable[..., str]

PROGRAM = """
import signal, sys
from importlib.machinery import PathFinder

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
blocked = set(sys.argv.pop(1).split())

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from sg_export.cli import main

main(prog_name="sg-export")
"""


@pytest.fixture(scope="session", autouse=True)
def _hang_up_is_heard() -> Iterator[None]:
    """Undo `nohup` of a test run, which would hide SIGHUP from the tests and their children."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def cli() -> Run:
    """Return a function that runs the command line in this process and returns click's result."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def refused(cli: Run) -> Refused:
    """Return a function that runs a command line that must fail and returns its message.

    The command must end with the given exit code, a message and no traceback.
    """

    def run(exit_code: int, *arguments: object) -> str:
        result = cli(*arguments)
        assert result.exit_code == exit_code, result.output
        assert "Traceback" not in result.output
        message = result.stderr[result.stderr.rindex("Error: ") :]
        return message.removeprefix("Error: ").rstrip("\n")

    return run


def command(*arguments: object, blocked: Sequence[str] = ()) -> list[str]:
    """Return the command of a process that runs the command line without the modules `blocked`.

    `blocked` holds names of top-level modules, which the process does not find.
    """
    return [sys.executable, "-c", PROGRAM, " ".join(blocked), *(str(argument) for argument in arguments)]


@pytest.fixture
def environment() -> dict[str, str]:
    """An environment for processes that use this checkout and this interpreter's programs.

    This checkout is found first, and the programs are found by their name. PyTorch has one thread,
    as in this process.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    settings = {"PATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(ROOMS), **settings}


@pytest.fixture
def process(tmp_path: Path, environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that runs the command line in a separate process, in `tmp_path`."""

    def run(*arguments: object, blocked: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command(*arguments, blocked=blocked),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )

    return run


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Return a function that starts the command line in a separate process, in `tmp_path`.

    Its standard error is a pipe. The process is killed after `LIMIT` seconds, which ends the pipe.
    """
    timers: list[threading.Timer] = []

    def run(*arguments: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command(*arguments), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        timers.append(threading.Timer(LIMIT, process.kill))
        timers[-1].start()
        return process

    yield run
    for timer in timers:
        timer.cancel()


@pytest.fixture
def mounted(tmp_path: Path, environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that runs the command line with a separate mount at `tmp_path`/disk.

    mount: the arguments of mount before the folder. Standard output ends with "left:" and a listing
    of the files left in the mount. The test is skipped if this user may not mount.
    """
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(mount: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        inside = ["unshare", "-rm", "sh", "-c"]
        if shutil.which("unshare") is None:
            pytest.skip("needs unshare, of util-linux")
        tried = subprocess.run([*inside, f"mount {mount} {disk}"], capture_output=True, text=True, timeout=60)
        if tried.returncode != 0:
            pytest.skip(f"may make no mount here: {tried.stderr.strip()}")
        script = f'mount {mount} {disk} || exit 99; "$@"; code=$?; echo left:; ls -A {disk}; exit $code'
        return subprocess.run(
            [*inside, script, "sh", *command(*arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )

    return run
