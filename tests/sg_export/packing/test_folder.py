"""The folder of a bundle: what may be replaced, and what a build leaves."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sg_export.packing.folder import check_output, check_place, new_folder
from sg_runtime.errors import EngineError, UsageError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with the files of a bundle, among them the results of verify."""
    folder = tmp_path / "bundle"
    (folder / "graphs").mkdir(parents=True)
    listed = ("graphs/dense.onnx", "graphs/weights.bin")
    for name in (*listed, "verify.json"):
        (folder / name).write_text("")
    manifest = {"created_by": "sg-export 0", "files": dict.fromkeys(listed)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_check_output_of_a_whole_bundle_passes_with_force_alone(bundle: Path) -> None:
    check_output(bundle, force=True)
    with pytest.raises(UsageError, match="bundle: exists: give another `output`, or `force` to replace it"):
        check_output(bundle, force=False)


@pytest.mark.parametrize(
    ("foreign", "found"),
    [
        (("notes.txt",), "notes.txt"),
        (("last.pt", "parity/dense.json", "parity/outputs/dense.npz"), "last.pt, parity"),
        (("graphs/mine.onnx", ".git/config"), ".git, graphs/mine.onnx"),
        (("graphs/dense/notes.txt",), "graphs/dense"),
        ([f"sample-{k}.png" for k in range(9)], ", ".join(f"sample-{k}.png" for k in range(8)) + " and 1 more"),
    ],
)
def test_check_output_of_a_bundle_with_foreign_files_names_them(
    foreign: tuple[str, ...], found: str, bundle: Path
) -> None:
    for name in foreign:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("mine")
    with pytest.raises(UsageError) as caught:
        check_output(bundle, force=True)
    assert str(caught.value) == (
        f"{bundle}: expected only files of the bundle, found {found}: `force` would delete them: move them, or give "
        f"another `output`"
    )


def test_check_output_of_a_bundle_with_a_link_names_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (bundle / "data").symlink_to("../data")
    with pytest.raises(UsageError, match="found data: `force` would delete them"):
        check_output(bundle, force=True)


@pytest.mark.parametrize("name", [".", "manifest.json", "last.pt"])
def test_check_output_that_holds_an_input_raises(name: str, bundle: Path) -> None:
    """An input is refused also if it is the bundle itself (--like) or one of its own files."""
    with pytest.raises(UsageError, match=r"bundle: holds .*, which this build reads: give another `output`"):
        check_output(bundle, force=True, inputs=[bundle / name])
    check_output(bundle, force=True, inputs=[bundle.parent / "last.pt"])


KILLED = """
import os, signal, sys
from pathlib import Path
from sg_export.packing.folder import new_folder

rename = Path.rename

def kill_before_the_second(path, target):
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)

with new_folder(Path("out"), force=True) as folder:
    (folder / "weights.bin").write_text("new")
    if sys.argv[1] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "manifest.json").write_text('{"created_by": "sg-export 1"}')
    Path.rename = kill_before_the_second
"""
"""A build that is killed while it writes, or after it moved the old bundle away."""


def run_killed(when: str, folder: Path) -> list[Path]:
    """Run KILLED in `folder` and return the hidden folders that it leaves."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", KILLED, when], cwd=folder, env=environment, check=False, timeout=60)
    return sorted(folder.glob(".out.*.partial"))


def test_new_folder_removes_what_a_killed_build_left(tmp_path: Path) -> None:
    assert len(run_killed("writing", tmp_path)) == 1
    with new_folder(tmp_path / "other", force=False):
        assert len(list(tmp_path.glob(".out.*.partial"))) == 1, "only builds of the same name"
    with new_folder(tmp_path / "out", force=False) as folder:
        assert list(tmp_path.glob(".out.*.partial")) == [folder]


def test_new_folder_leaves_the_folder_of_a_living_build(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", force=False) as first:
        (first / "weights.bin").write_text("")
        with pytest.raises(ValueError, match="stop"), new_folder(tmp_path / "out", force=False):
            raise ValueError("stop")
        assert (first / "weights.bin").exists()


def test_new_folder_keeps_whole_bundles_until_there_is_a_newer_one(tmp_path: Path) -> None:
    """A build that was killed between its two last steps leaves two bundles under hidden names."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"created_by": "sg-export 0"}')
    left = run_killed("renaming", tmp_path)
    assert len(left) == 2
    assert not (tmp_path / "out").exists()
    for _ in range(2):
        with new_folder(tmp_path / "out", force=True) as folder:
            (folder / "manifest.json").write_text('{"created_by": "sg-export 2"}')
            remaining = set(left) & set(tmp_path.iterdir())
            assert len(remaining) == (0 if (tmp_path / "out").exists() else 2)


def test_check_place_of_a_mount_point_raises() -> None:
    with pytest.raises(UsageError, match=r"/proc: is a mount point, which cannot be replaced: give .* /proc/bundle"):
        check_place(Path("/proc"))


def test_check_place_leaves_nothing(tmp_path: Path) -> None:
    check_place(tmp_path / "new/out")
    assert list(tmp_path.iterdir()) == []


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
VAGUE = OSError("problem writing element 23552 to file")


@pytest.mark.parametrize(
    ("error", "disk", "message"),
    [
        (FULL, "out", "out: the disk is full; free some space, or give `output` on another disk"),
        (FULL, "", "out: the disk is full; free"),  # the partial file is gone again
        (FULL, "scratch", "the disk of temporary files is full; free some space, or set TMPDIR to a folder on"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "out", "out: the disk is full; free"),
        (VAGUE, "out", "out: the disk is full; free"),
        (VAGUE, "scratch", "the disk of temporary files is full"),
        (VAGUE, "", r"out: cannot be written \(problem writing element"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "out", "out: the disk is full; free"),
        (RuntimeError("a bug"), "", "a bug"),
        (EngineError(f"guided: {FULL}"), "", "out: the disk is full; free"),
        (EngineError("guided: a bug"), "out", "guided: a bug"),
        (PermissionError(errno.EACCES, "denied", "/elsewhere/last.pt"), "", "denied: '/elsewhere/last.pt'"),
    ],
)
def test_new_folder_tells_a_full_disk_from_other_errors(
    error: Exception, disk: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {"out": lambda folder: folder.parent == tmp_path, "scratch": lambda folder: folder.parent != tmp_path}
    monkeypatch.setattr("sg_export.packing.folder.is_full", full.get(disk, lambda folder: False))
    with pytest.raises(Exception, match=message), new_folder(tmp_path / "out", force=False):
        raise error
    assert list(tmp_path.iterdir()) == []
