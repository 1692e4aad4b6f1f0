"""Atomic file replacement, file hashes, and the cache folder."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = "SG_EXPORT_CACHE"
"""Environment variable with the path of the cache folder."""


def cache_folder() -> Path:
    """Return the cache folder. Its content can be made again.

    $SG_EXPORT_CACHE, or `sg-export` in the user's cache folder ($XDG_CACHE_HOME, ~/.cache).
    """
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sg-export"


def temporary_beside(path: Path) -> Path:
    """Return a new unique hidden name next to `path`, for a file that is later renamed to it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


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


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256 of a file, or of several files joined, in lower-case hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
