"""The folder of a job: its lock, what it is, and which of its shards are complete."""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from sg_runtime.bulk.formats import IMAGES, METADATA, NPZ, PARTS, File, names_of, write_metadata, write_npz
from sg_runtime.bulk.job import Job
from sg_runtime.errors import JobError, UsageError
from sg_runtime.files import replacing, sha256_of, to_disk
from sg_runtime.manifest import FileFacts
from sg_runtime.manifest.base import Strict

LOG = logging.getLogger("sg_runtime")

LOCK, JOB, RECORDS = "job.lock", "job.json", "shards.json"

LEFTOVERS = ".*.partial"
"""Names of files that a killed process may leave; see `sg_runtime.files.temporary_beside`."""

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Records(Strict):
    """What is complete of a job.

    shards: size and SHA-256 of the joined files of each complete shard, by its number.
    result: the .npz file, once it is written.
    """

    shards: dict[str, FileFacts] = field(default_factory=dict)
    result: FileFacts | None = None

    def __post_init__(self) -> None:
        if wrong := [shard for shard in self.shards if not shard.isdecimal()]:
            raise UsageError(f"shards: expected numbers, found {wrong[0]!r}")


REMEDIES = {Job: "give another `output`", Records: "delete this file, and all shards are sampled again"}
"""What helps if a file of this kind is damaged."""


class JobFolder:
    """A folder that this process alone works in. `opened` makes it."""

    def __init__(self, path: Path) -> None:
        """Read the job and what is complete of it. Raises JobError if a file is damaged."""
        self.path = path
        self.job = _read(Job, path / JOB) if (path / JOB).exists() else None
        self.records = _read(Records, path / RECORDS) if (path / RECORDS).exists() else Records()

    def begin(self, job: Job) -> None:
        """Take the job up, or go on with it, and check what is complete.

        A shard that differs from its record is sampled again, with a warning. Raises UsageError if
        the job began with other options, and JobError for records of another job.
        """
        if self.job is None:
            _write(job, self.path / JOB)
            self.job = job
        if differences := self.job.differences(job):
            raise UsageError(
                f"{self.path}: expected the options that its job began with, found {', '.join(differences)}: give the "
                f"same options, or another `output`"
            )
        if foreign := [shard for shard in self.records.shards if int(shard) >= job.shards]:
            raise JobError(
                f"{self.path / RECORDS}: expected shards below {job.shards}, found {foreign[0]}: {REMEDIES[Records]}"
            )
        for folder in (self.path, self.path / IMAGES, self.path / PARTS):
            for left in folder.glob(LEFTOVERS):
                left.unlink()
        if self.records.result is not None:
            if self._fits([NPZ], self.records.result, "all its images are sampled again"):
                return
            self.records = Records()
        complete = {
            shard: facts
            for shard, facts in self.records.shards.items()
            if self._fits(names_of(job, int(shard)), facts, f"shard {shard} is sampled again")
        }
        self.records = Records(complete)

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are to be sampled."""
        job = self._begun
        if self.records.result is not None:
            return []
        return [shard for shard in range(job.shards) if str(shard) not in self.records.shards]

    @property
    def images(self) -> int:
        """Number of the images in complete shards."""
        job = self._begun
        return job.count - sum(len(job.images(shard)) for shard in self.missing)

    def write(self, shard: int, files: list[File]) -> None:
        """Write a shard, and then the record of it.

        A process that is killed in between leaves the files of a shard that is sampled again.
        """
        digest = hashlib.sha256()
        for name, content in files:
            path = self.path / name
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            digest.update(content)
        size = sum(len(content) for _, content in files)
        shards = {**self.records.shards, str(shard): FileFacts(size, digest.hexdigest())}
        self.records = Records({number: shards[number] for number in sorted(shards, key=int)})
        self._save()

    def finish(self) -> None:
        """Write what belongs to all shards, and remove what is no longer needed.

        Raises JobError if a shard was altered since it was written.
        """
        job = self._begun
        if job.format == "png":
            write_metadata(job, self.path / METADATA)
        elif job.format == "npz":
            if self.records.result is None:
                result = self.path / NPZ
                write_npz(job, result, map(self._part, range(job.shards)))
                self.records = Records(result=FileFacts(result.stat().st_size, sha256_of(result)))
                self._save()
            shutil.rmtree(self.path / PARTS, ignore_errors=True)

    @property
    def _begun(self) -> Job:
        assert self.job is not None, "begin it first"
        return self.job

    def _part(self, shard: int) -> bytes:
        """Return the content of a shard of an .npz file."""
        (name,) = names_of(self._begun, shard)
        content = (self.path / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.records.shards[str(shard)].sha256:
            raise JobError(
                f"{self.path / name}: expected the shard that was written, found another content: start the same "
                f"command again, which samples it again"
            )
        return content

    def _fits(self, names: list[str], facts: FileFacts, remedy: str) -> bool:
        """Whether the joined files are those that were written. Warns if they are not."""
        paths = [self.path / name for name in names]
        wanted = f"SHA-256 {facts.sha256[:12]}…"
        try:
            if (size := sum(path.stat().st_size for path in paths)) != facts.size:
                wanted, found = f"{facts.size} bytes", f"{size}"
            elif (sha256 := sha256_of(*paths)) == facts.sha256:
                return True
            else:
                found = f"{sha256[:12]}…"
        except OSError as error:
            found = f"files that cannot be read ({error.strerror})"
        where = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
        LOG.warning("%s: expected %s, found %s: %s", where, wanted, found, remedy)
        return False

    def _save(self) -> None:
        _write(self.records, self.path / RECORDS)


@contextmanager
def opened(path: Path) -> Iterator[JobFolder]:
    """Open the folder of a job, or make it, for this process alone.

    The lock is the operating system's. It ends with the process, however that ends. Raises
    UsageError if another process works in the folder, or if it holds other files than a job's.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    if not (path / JOB).exists():
        others = sorted(other.name for other in path.iterdir() if other.name != LOCK and not other.match(LEFTOVERS))
        if others:
            raise UsageError(
                f"{path}: expected an empty folder, or that of a job, found {others[0]}: give another `output`"
            )
    with (path / LOCK).open("a+", encoding="utf-8") as lock:
        if not _locked(lock):
            lock.seek(0)
            raise UsageError(
                f"{path}: expected no other process at work there, found {lock.read().strip() or 'one'}: wait until it "
                f"ends, or give another `output`"
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        try:
            yield JobFolder(path)
        finally:
            if not (path / JOB).exists():  # nothing has begun
                (path / LOCK).unlink()
                with suppress(OSError):  # other files
                    if made:
                        path.rmdir()


def _locked(lock: IO[str]) -> bool:
    """Lock an open file. Returns whether it is locked for this process, and still has its name."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def _read(kind: type[R], path: Path) -> R:
    """Read a record strictly. Raises JobError if the file is damaged."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (ValidationError, UsageError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
        raise JobError(
            f"{path}: expected a record of a sampling job, found a damaged one ({reason}): {REMEDIES[kind]}"
        ) from None


def _write(record: Job | Records, path: Path) -> None:
    """Write a record as JSON."""
    from pydantic import TypeAdapter

    with replacing(path) as temporary:
        temporary.write_bytes(TypeAdapter(type(record)).dump_json(record, indent=1) + b"\n")
        to_disk(temporary)
