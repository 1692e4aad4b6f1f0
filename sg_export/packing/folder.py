"""The folder of a bundle. A failed build leaves no files and does not change an existing bundle."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sg_runtime.errors import ExportError, UsageError
from sg_runtime.files import temporary_beside
from sg_runtime.manifest import MANIFEST_FILE


def check_output(output: Path, force: bool) -> None:
    """Raise UsageError if `output` exists and may not be replaced.

    It may be replaced only with `force`, and only if it is a bundle or an empty folder.
    """
    target = output.resolve()  # "new/.." is a folder that exists
    if not target.exists():
        return
    if not force:
        raise UsageError(f"{output}: exists: give another --output, or --force to replace it")
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not _is_bundle(target):
        raise UsageError(f"{output}: exists and is not a bundle, so --force does not replace it: give another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether the folder has a manifest of any schema version that sg-export wrote."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("created_by")).startswith("sg-export")


@contextmanager
def new_folder(output: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `output` if the block succeeds.

    The temporary folder is next to `output`. If the block fails, it is removed. An existing bundle
    is kept, or restored, unless the new one is in place. Raises UsageError if the folder cannot be
    created, and ExportError if the disk is full or another system error stops the block.
    """
    target = output.resolve()  # "." has no name, and a link is not what gets replaced
    temporary, old = temporary_beside(target), temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(_disk_message(output, error)) from None
        raise UsageError(f"{output}: cannot be written ({error.strerror}): give another --output") from None
    try:
        yield temporary
        check_output(output, force)  # again: another build may have written it in the meantime
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except OSError as error:
        raise ExportError(_disk_message(output, error)) from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def _disk_message(output: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{output}: the disk is full; free some space, or give an --output on another disk"
    return f"{output}: cannot be written ({error.strerror or error})"
