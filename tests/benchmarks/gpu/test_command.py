"""The command: dry run, exit codes, and parts that are not run again."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts
from benchmarks.gpu.machine import Found
from benchmarks.gpu.results import read

CHECKS = """
import os
from benchmarks.gpu.results import Finding

def good(context):
    yield Finding("", True)

def bad(context):
    yield Finding("", False, "a reason")

def aborts(context):
    os.abort()
    yield Finding()

GOOD, BAD, ABORTS = (good,), (bad,), (aborts,)
"""

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Found) -> Run:
    """Return a function that runs the command with parts good, bad and aborts on a stand-in GPU."""
    (tmp_path / "checks_to_run.py").write_text(CHECKS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    made = {
        name: parts.Part(name, f"checks_to_run:{name.upper()}", 60, f"Part {name}.", ort=False, modules=())
        for name in ("good", "bad", "aborts")
    }
    monkeypatch.setattr(parts, "PARTS", made)
    monkeypatch.setattr("benchmarks.gpu.page.PARTS", made)
    monkeypatch.setattr(command, "find", lambda: found)

    def call(*arguments: str, commit: str = "abc", xl: Path = tmp_path / "xl") -> int:
        return command.main([*arguments, "--results", str(tmp_path), "--commit", commit, "--xl", str(xl)])

    return call


def test_run_writes_results_and_page_and_tells_where(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("good") == 0
    folder = tmp_path / "a-card-80gb"
    assert read(folder / "good.json").machine.commit == "abc"
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {folder / 'README.md'}"
    assert "| good | passed | 1 of 1 |" in (folder / "README.md").read_text()


def test_run_goes_on_after_a_part_that_fails(run: Run, tmp_path: Path) -> None:
    assert run("aborts", "bad", "good") == 5
    page = (tmp_path / "a-card-80gb" / "README.md").read_text()
    assert "| good | passed |" in page
    assert "| bad | **failed** |" in page
    assert "| aborts | **not complete** |" in page
    assert "* bad: a reason" in page


def test_run_skips_complete_results_of_the_same_code_only(run: Run, tmp_path: Path) -> None:
    def began() -> dict[str, int]:
        """Return when each file was written."""
        return {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "a-card-80gb").glob("*.json")}

    assert run("good", "bad", "aborts") == 5
    first = began()
    assert run("good", "bad", "aborts") == 5  # a failed check stays a failure
    second = began()
    assert {name for name in first if first[name] != second[name]} == {"aborts"}
    assert run("good", commit="def") == 0
    third = began()
    assert {name for name in second if second[name] != third[name]} == {"good"}
    assert run("good", "--fresh", commit="def") == 0
    assert began()["good"] != third["good"]


def test_run_of_other_libraries_is_not_skipped(
    run: Run, found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("good") == 0
    newer = replace(found, versions={**found.versions, "torch": "2.12.0+cu130"})
    monkeypatch.setattr(command, "find", lambda: newer)
    assert run("good") == 0
    assert read(tmp_path / "a-card-80gb" / "good.json").machine.versions["torch"] == "2.12.0+cu130"


def test_run_of_a_part_that_lacks_something_keeps_its_result(
    run: Run, found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("good", "bad") == 5
    before = read(tmp_path / "a-card-80gb" / "good.json")
    lacking = replace(parts.PARTS["good"], modules=("pytest",))
    monkeypatch.setitem(parts.PARTS, "good", lacking)
    bare = {name: version for name, version in found.versions.items() if name != "pytest"}
    monkeypatch.setattr(command, "find", lambda: replace(found, versions=bare))
    assert run("good", commit="def") == 5
    assert read(tmp_path / "a-card-80gb" / "good.json") == before
    assert "good: not run: missing pytest: pip install pytest" in capsys.readouterr().out


def test_run_without_a_gpu_ends_with_one_line(
    run: Run, found: Found, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "find", lambda: replace(found, card="", cuda=""))
    assert run() == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no GPU to check: missing torch with CUDA: found torch 2.11.0+cu130")
    assert not list(tmp_path.glob("*/*.json"))


def test_run_with_a_damaged_result_ends_before_any_work(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("good") == 0
    path = tmp_path / "a-card-80gb" / "good.json"
    path.write_text(json.dumps({"part": "good"}))
    assert run("bad") == 6
    assert f"error: {path}: expected a result" in capsys.readouterr().err
    assert not (tmp_path / "a-card-80gb" / "bad.json").exists()


def test_run_over_the_limit_names_the_parts_that_are_left(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(parts, "LIMIT", 0)
    assert run() == 5
    assert "good: not run: the 0 s are over; the same command goes on here" in capsys.readouterr().out
    assert run("good") == 0  # a part that is named has its own limit


def test_interrupted_command_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> Found:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "find", interrupt)
    assert run("good") == 130


def test_unknown_part_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("fast")
    assert ended.value.code == 2
    assert "expected some of good, bad, aborts, found fast" in capsys.readouterr().err


def test_dry_run_here_lists_parts_limits_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The real parts on this machine. It writes nothing."""
    assert command.main(["--dry-run", "--xl", str(tmp_path / "xl"), "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("driver", "correctness", "build-xl", "speed", "eager"):
        assert f"\n{name}: at most {parts.PARTS[name].seconds} s; needs " in f"\n{out}"
    assert "needs a GPU and torch with CUDA, onnxruntime-gpu >= 1.31.1, the XL bundles" in out
    assert "the XL bundles (" in out
    assert "all together: at most 300 s" in out
    assert not list(tmp_path.iterdir())
