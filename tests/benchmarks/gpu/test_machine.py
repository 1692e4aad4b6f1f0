"""What is found on a machine, and which code is measured."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import machine


def test_find_reads_the_libraries_of_this_machine_in_another_process() -> None:
    found = machine.find()
    assert found.versions["torch"] == torch.__version__
    assert found.versions["numpy"] == np.__version__
    assert found.cuda == (torch.version.cuda or "")
    assert "CPUExecutionProvider" in found.providers
    assert {"python", "torch", "onnxruntime", "numpy"} <= set(found.measured)


def test_find_of_a_process_that_fails_tells_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, sys\nprint('broken driver', file=sys.stderr)\nos._exit(3)")
    own = machine.environment
    monkeypatch.setattr(machine, "environment", lambda: {**own(), "PYTHONPATH": f"{tmp_path}:{own()['PYTHONPATH']}"})
    with pytest.raises(RuntimeError, match="exit code 3: broken driver"):
        machine.find()


def test_look_reports_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no libcudart')")
    (tmp_path / "torch.py").write_text("raise OSError('no libcublas')")
    own = machine.environment
    monkeypatch.setattr(machine, "environment", lambda: {**own(), "PYTHONPATH": f"{tmp_path}:{own()['PYTHONPATH']}"})
    found = machine.find()
    assert found.errors == {"torch": "no libcublas", "onnxruntime": "no libcudart"}
    assert "torch" not in found.versions
    assert found.card == ""


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_is_the_last_commit_that_changed_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("sg_export/a.py", "a = 1")
    commit, sources = machine.code(tmp_path)
    assert commit == "unknown"
    assert machine.code(tmp_path, "abc") == ("abc", sources)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "code")
    first = git("log", "-1", "--format=%h")
    assert machine.code(tmp_path) == (first, sources)
    write("benchmarks/results/gpu/card/driver.json", "{}")
    git("add", ".")
    git("commit", "-qm", "results")
    assert machine.code(tmp_path) == (first, sources)
    write("sg_export/a.py", "a = 2")
    changed, other = machine.code(tmp_path)
    assert changed == f"{first}+changes"
    assert other != sources
    git("commit", "-qam", "more")
    assert machine.code(tmp_path) == (git("log", "-1", "--format=%h"), other)
