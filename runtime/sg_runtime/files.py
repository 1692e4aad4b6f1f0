"""Files that appear whole or not at all, their hashes, and the folder for what can be made again."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = "SG_EXPORT_CACHE"
"""The environment variable that names the cache folder."""


def cache_folder() -> Path:
    """$SG_EXPORT_CACHE, or sg-export in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sg-export"


def temporary_beside(path: Path) -> Path:
    """A new name beside `path`, hidden and unlike any other, for what will be renamed to it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block succeeds and goes when it fails."""
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
