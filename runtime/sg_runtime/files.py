"""Atomic file replacement, file hashes, and the cache folder."""

import errno
import glob
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = "SG_EXPORT_CACHE"
"""Environment variable with the path of the cache folder."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the system's errors that mean a full disk."""


def cache_folder() -> Path:
    """Return the cache folder. Its content can be made again.

    $SG_EXPORT_CACHE, or `sg-export` in the user's cache folder ($XDG_CACHE_HOME, ~/.cache). Raises
    FileNotFoundError if the user has no home folder.
    """
    if given := os.environ.get(CACHE):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sg-export"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, f"no home folder; set {CACHE}", "~/.cache/sg-export") from None


def temporary_beside(path: Path) -> Path:
    """Return a new unique hidden name next to `path`, for a file that is later renamed to it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def leftovers_of(path: Path) -> str:
    """Return the pattern of the names that `temporary_beside` gives, in any process."""
    return f".{glob.escape(path.name)}.*-{'[0-9a-f]' * 8}.partial"


def check_room(folder: Path) -> None:
    """Raise OSError if no file can be made in `folder`, or in its first parent that exists.

    Nothing is left, also if the process is killed.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def is_full(folder: Path, size: int = 1 << 20) -> bool:
    """Whether the disk of `folder`, or the user's share of it, has no room for `size` bytes."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            for written in range(0, size, 1 << 20):
                stream.write(bytes(min(1 << 20, size - written)))
    except OSError as error:
        return error.errno in FULL
    return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`.

    If the block succeeds, the temporary file replaces `path`. If it fails, the file is deleted.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until the content of a file is on its disk, so that it outlives a loss of power."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def state_of(path: Path) -> tuple[int, ...]:
    """Return device, inode, size and times of a file. It differs if the content differs.

    It is empty if the file cannot be read.
    """
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256 of a file, or of several files joined, in lower-case hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
