"""Folders of jobs: their lock, and records that are damaged."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_folders import content, environment

from sg_runtime.bulk import Job, Request, run_job
from sg_runtime.bulk.folder import JOB, LOCK, RECORDS, JobFolder, opened
from sg_runtime.bulk.job import plan
from sg_runtime.errors import JobError, UsageError
from sg_runtime.sampling import Churn

Make = Callable[..., Request]

HOLDER = """
import sys, time
from pathlib import Path
from sg_runtime.bulk.folder import opened

with opened(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def job_of(request: Request) -> Job:
    pipe, bundle = request.load()
    return plan(request, pipe, bundle)


def test_folder_in_which_a_process_works_is_refused_until_it_is_killed(request_of: Make, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            UsageError, match=f"expected no other process at work there, found process {holder.pid} on "
        ):
            run_job(request_of(), tmp_path)
        assert os.listdir(tmp_path) == [LOCK]
        holder.kill()
    assert run_job(request_of(), tmp_path).sampled == 10


def test_folder_that_is_opened_twice_in_a_process_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(UsageError, match=f"found process {os.getpid()} on "), opened(tmp_path):
        pass


def test_folder_in_which_nothing_began_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "new", "a/b"):
        with opened(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "old"]
    assert not list((tmp_path / "old").iterdir())


def test_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(UsageError, match=r"expected an empty folder, or that of a job, found thesis\.tex"),
        opened(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"format": "npz", "classes": (1, 2)}, {"churn": Churn(2.0)}),  # to infinity
        ({"seed": 2**64 - 1}, {"churn": Churn(2.0, 0.1, 50.0, 1.1), "negative": "", "prompts": ("a „cat“",)}),
    ],
)
def test_job_that_is_written_and_read_is_equal(
    changes: dict[str, Any], settings: dict[str, Any], request_of: Make, tmp_path: Path
) -> None:
    job = replace(job_of(request_of(**changes)), **settings)
    with opened(tmp_path) as folder:
        folder.begin(job)
    assert JobFolder(tmp_path).job == job


@pytest.mark.parametrize(
    ("name", "damaged", "message"),
    [
        (JOB, b"", "Invalid JSON"),
        (JOB, b"[]", "content"),
        (JOB, b'{"count": 3}', "schema_version: "),
        (RECORDS, b'{"shards": {', "Invalid JSON"),
        (RECORDS, b'{"shards": {"one": {"size": 1, "sha256": ""}}}', "shards: expected numbers, found 'one'"),
        (RECORDS, b'{"shards": {}, "more": 1}', "more: "),
    ],
)
def test_record_that_is_damaged_ends_with_6_and_its_remedy(
    name: str, damaged: bytes, message: str, request_of: Make, tmp_path: Path
) -> None:
    run_job(request_of(), tmp_path)
    before = content(tmp_path)
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(JobError) as caught:
        run_job(request_of(), tmp_path)
    assert f"{tmp_path / name}: expected a record of a sampling job, found a damaged one" in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 6
    if name == RECORDS:  # the remedy
        (tmp_path / name).unlink()
        assert run_job(request_of(), tmp_path).sampled == 10
        assert content(tmp_path) == before


def test_records_of_a_job_of_more_shards_end_with_6(request_of: Make, tmp_path: Path) -> None:
    run_job(request_of(count=20), tmp_path / "more")
    run_job(request_of(), tmp_path / "out")
    shutil.copy(tmp_path / "more" / RECORDS, tmp_path / "out")
    with pytest.raises(JobError, match="expected shards below 3, found 3: delete this file, and all shards are"):
        run_job(request_of(), tmp_path / "out")


def test_shard_that_is_altered_before_the_npz_is_written_ends_with_6(request_of: Make, tmp_path: Path) -> None:
    job = job_of(request_of(format="npz"))
    with opened(tmp_path) as folder:
        folder.begin(job)
        for shard in folder.missing:
            folder.write(shard, [(f"parts/{shard:05}.npy", b"no shard")])
        (tmp_path / "parts/00000.npy").write_bytes(b"other")
        with pytest.raises(JobError, match=r"00000\.npy: expected the shard that was written, found another content"):
            folder.finish()
    assert not (tmp_path / "samples.npz").exists()


def test_write_on_a_full_disk_leaves_the_record_as_it_was(
    request_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file of a shard finds no room."""
    job, writes = job_of(request_of()), []

    def write(path: Path, data: bytes) -> int:
        writes.append(path)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with path.open("wb") as stream:
            return stream.write(data)

    with opened(tmp_path) as folder:
        folder.begin(job)
        monkeypatch.setattr(Path, "write_bytes", write)
        with pytest.raises(OSError, match="No space left"):
            folder.write(0, [("images/000000.png", b"a"), ("images/000001.png", b"b")])
        assert folder.missing == [0, 1, 2]
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000000.png"]
    assert not (tmp_path / RECORDS).exists()
    monkeypatch.undo()
    assert run_job(request_of(), tmp_path).sampled == 10
