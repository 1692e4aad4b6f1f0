"""Parts in processes of their own: whatever a check does there, the part ends with findings."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu.fence import run_part
from benchmarks.gpu.parts import Part
from benchmarks.gpu.results import Finding, Machine

CHECKS = """
import os, subprocess, sys, time
from benchmarks.gpu.results import Figure, Finding

def fine(context):
    assert context.scratch.is_dir()
    yield Finding("one", True, "", (Figure.of("time", "ms", 1.0),))
    yield Finding("two", None)

def raises(context):
    yield Finding("before", True)
    raise ValueError("a reason")

def exits(context):
    yield Finding("before", True)
    print("last words", file=sys.stderr, flush=True)
    os._exit(7)

def leaves(context):
    yield Finding("before", True)
    sys.exit(3)

def aborts(context):
    os.abort()
    yield Finding()

def hangs(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Finding("before", True, str(child.pid))
    time.sleep(600)

CHECKS = (fine, raises, exits, leaves, aborts, fine)
GOOD = (fine,)
HANGS = (fine, hangs, fine)
"""


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module of checks that the processes can import."""
    (tmp_path / "checks_to_fence.py").write_text(CHECKS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return "checks_to_fence"


def part(checks: str) -> Part:
    return Part("driver", checks, 60, "", modules=())


def brief(findings: tuple[Finding, ...]) -> list[tuple[str, str, bool | None]]:
    return [(finding.check, finding.setting, finding.passed) for finding in findings]


FINE = [("fine", "one", True), ("fine", "two", None)]


def test_run_part_of_good_checks_is_complete(checks: str, machine: Machine, tmp_path: Path) -> None:
    told: list[Finding] = []
    result = run_part(part(f"{checks}:GOOD"), machine, tmp_path, 60, told.append)
    assert result.ok
    assert brief(result.findings) == FINE
    assert tuple(told) == result.findings
    assert result.findings[0].figures[0].median == 1
    assert (result.part, result.machine) == ("driver", machine)


def test_run_part_goes_on_after_each_check_that_fails(checks: str, machine: Machine, tmp_path: Path) -> None:
    result = run_part(part(f"{checks}:CHECKS"), machine, tmp_path, 60, lambda _: None)
    assert not result.complete
    assert brief(result.findings) == [
        *FINE,
        ("raises", "before", True),
        ("raises", "", False),
        ("exits", "before", True),
        ("exits", "", False),
        ("leaves", "before", True),
        ("leaves", "", False),
        ("aborts", "", False),
        *FINE,
    ]
    raised, exited, left, aborted = result.failures
    assert raised.said == "ValueError: a reason"
    assert raised.details[-1] == "ValueError: a reason"
    assert exited.said == "ended its process (exit code 7): last words"
    assert left.said.startswith("ended its process (exit code 3)")
    assert "SIGABRT" in aborted.said


def test_run_part_beyond_its_limit_is_stopped_with_its_children(checks: str, machine: Machine, tmp_path: Path) -> None:
    began = time.monotonic()
    result = run_part(part(f"{checks}:HANGS"), machine, tmp_path, 3, lambda _: None)
    assert time.monotonic() - began < 20
    assert not result.complete
    before, stopped = result.findings[-2:]
    assert brief((before, stopped)) == [("hangs", "before", True), ("hangs", "", False)]
    assert stopped.said.startswith("was stopped after 3 s")
    deadline = time.monotonic() + 10
    while Path(f"/proc/{before.said}").exists() and state(before.said) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state(pid: str) -> str:
    """Return the state of a process, "Z" if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_run_part_that_cannot_start_has_a_finding(checks: str, machine: Machine, tmp_path: Path) -> None:
    result = run_part(part(f"{checks}:NONE"), machine, tmp_path, 60, lambda _: None)
    assert not result.complete
    (finding,) = result.findings
    assert finding.check == "start"
    assert "has no attribute 'NONE'" in finding.said
