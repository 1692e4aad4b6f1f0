"""The folder of a bundle. A failed build leaves no files and does not change an existing bundle."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sg_runtime.errors import ExportError, SgError, UsageError
from sg_runtime.files import FULL, check_room, is_full, leftovers_of, temporary_beside
from sg_runtime.manifest import MANIFEST_FILE

VERIFY_FILE = "verify.json"
"""Name of the file in a bundle that holds the results of `sg-export verify`."""


LISTED = 8
"""Number of files that a message lists by name."""


def check_output(output: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise UsageError if `output` exists and may not be replaced.

    It may be replaced only with `force`, and only if it is an empty folder, or a bundle that holds
    nothing but its own files and verify's results. It may not hold one of `inputs`, the files and
    folders that the build reads.
    """
    target = output.resolve()  # "new/.." is a folder that exists
    if not target.exists():
        return
    if not force:
        raise UsageError(f"{output}: exists: give another `output`, or `force` to replace it")
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise UsageError(f"{output}: holds {path}, which this build reads: give another `output`")
    empty = target.is_dir() and not any(target.iterdir())
    own = own_files(target)
    if not empty and not own:
        raise UsageError(f"{output}: exists and is not a bundle, so `force` does not replace it: give another `output`")
    if own and (foreign := foreign_files(target, own | {VERIFY_FILE})):
        names = ", ".join(foreign[:LISTED]) + (f" and {len(foreign) - LISTED} more" if len(foreign) > LISTED else "")
        raise UsageError(
            f"{output}: expected only files of the bundle, found {names}: `force` would delete them: move them, or "
            f"give another `output`"
        )


def check_place(output: Path) -> None:
    """Raise UsageError if no folder can be made at `output`, ExportError if the disk is full."""
    target = output.resolve()
    if target.is_mount():
        raise UsageError(
            f"{output}: is a mount point, which cannot be replaced: give a folder in it, `output` {output / 'bundle'}"
        )
    try:
        check_room(target.parent)
    except OSError as error:
        raise _unwritable(output, error) from None


def own_files(folder: Path) -> set[str]:
    """Return the files of a bundle that sg-export wrote, relative to `folder`; empty if it is none.

    They are the manifest, of any schema version, and the files that it lists.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return set()
    if not isinstance(content, dict) or not str(content.get("created_by")).startswith("sg-export"):
        return set()
    listed = content.get("files")
    return {MANIFEST_FILE, *(listed if isinstance(listed, dict) else ())}


def own_paths(bundles: Iterable[Path]) -> list[Path]:
    """Return the paths of the files that sg-export wrote to these bundles."""
    return [bundle / name for bundle in bundles for name in own_files(bundle)]


def foreign_files(folder: Path, own: set[str]) -> list[str]:
    """Return the files in `folder` that are not `own`. A subfolder with none of them is one."""
    found = []
    for path in sorted(folder.iterdir()):
        within = {name.partition("/")[2] for name in own if name.partition("/")[0] == path.name}
        if not within:
            found.append(path.name)
        elif path.is_dir() and not path.is_symlink():
            found += [f"{path.name}/{name}" for name in foreign_files(path, within)]
    return found


@contextmanager
def new_folder(
    output: Path,
    force: bool,
    inputs: Iterable[Path] = (),
    check: Callable[[Path, bool, Iterable[Path]], None] = check_output,
) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `output` if the block succeeds.

    force, inputs: see `check_output`.
    check: function that raises UsageError if an existing `output` may not be replaced.

    The temporary folder is next to `output`. If the block fails, it is removed. If the process is
    killed, the next build of `output` removes it. An existing bundle is kept, or restored, unless
    the new one is in place. Raises UsageError if the folder cannot be created, and ExportError if
    the disk is full or `output` cannot be written. An error of another file names that file.
    """
    target = output.resolve()  # "." has no name, and a link is not what gets replaced
    temporary, old = temporary_beside(target), temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary.mkdir()
        lock = _lock(temporary)
    except OSError as error:
        raise _unwritable(output, error) from None
    try:
        yield temporary
        check(output, force, inputs)  # again: another build may have written it in the meantime
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except Exception as error:
        explained = _explained(error, output, target, temporary)
        if explained is error:
            raise
        raise explained from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary folders beside `target` that killed builds left.

    A complete bundle stays if `target` is missing: it is the new one, or the one that was about to
    be replaced.
    """
    for folder in target.parent.glob(leftovers_of(target)):
        lock = _lock(folder)
        if lock is not None:
            if target.exists() or not (folder / MANIFEST_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder for this process and return the descriptor that holds the lock.

    The system releases the lock when the process ends, however it ends. Unlike a process number, it
    is also seen in other containers. Returns None if another process holds the lock, or if there
    are no locks here.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unwritable(output: Path, error: OSError) -> SgError:
    if error.errno in FULL:
        return ExportError(_full_message(output))
    return UsageError(f"{output}: cannot be written ({error.strerror or error}): give another `output`")


def _explained(error: Exception, output: Path, target: Path, temporary: Path) -> Exception:
    """Return the error of a block of `new_folder` as an error about `output`, if it is one.

    Libraries that write by themselves lose the system's reason (NumPy's "problem writing element",
    ONNX Runtime's exceptions), and no write error has a path. So the disks tell which is full.
    """
    number = error.errno if isinstance(error, OSError) else None
    # A copy names two files, and its error does not say which of them is at fault.
    named = [getattr(error, name, None) for name in ("filename", "filename2")]
    paths = [Path(name).absolute() for name in named if isinstance(name, str)]
    if paths and not any(path.is_relative_to(own) for path in paths for own in (temporary, target)):
        return error
    full = number in FULL or os.strerror(errno.ENOSPC) in str(error)
    if full or (number is None and not isinstance(error, SgError)):
        scratch = Path(tempfile.gettempdir())
        if not is_full(temporary) and is_full(scratch):
            return ExportError(
                f"{scratch}: the disk of temporary files is full; free some space, or set TMPDIR to a folder on "
                f"another disk"
            )
        if full or is_full(temporary):
            return ExportError(_full_message(output))
    if isinstance(error, OSError):
        return ExportError(f"{output}: cannot be written ({error.strerror or error})")
    return error


def _full_message(output: Path) -> str:
    return f"{output}: the disk is full; free some space, or give `output` on another disk"
