"""Open a bundle: a directory with a manifest. All files are checked before any is used."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from sg_runtime.errors import BundleError, UsageError
from sg_runtime.files import sha256_of, state_of
from sg_runtime.manifest import MANIFEST_FILE, FileFacts, GraphFacts, Manifest, read_manifest

STRAYS = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".directory", ".nfs*", ".fuse_hidden*", "@eaDir")
"""Names of files that desktops and network mounts leave in any folder."""

FOLDERS = ("graphs", "engines", "text")
"""Folders in the folder of a bundle."""

CHECKPOINTS = (".pt", ".pth", ".safetensors")
"""Ends of the names of checkpoints."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose files have been checked.

    path: folder of the bundle, as it was given.
    manifest: its manifest.
    checked: state of each checked file (device, inode, size, times), by its name.
    root: absolute path of the folder. It holds if the process changes its working folder.
    """

    path: Path
    manifest: Manifest
    checked: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    root: Path = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        try:
            root = self.path.absolute()
        except FileNotFoundError:  # the working folder was replaced, by a build for example
            root = self.path
        object.__setattr__(self, "root", root)

    @classmethod
    def open(cls, path: str | Path, *, verify_hashes: bool = True) -> "Bundle":
        """Read the manifest of the bundle at `path` and check its files.

        Sizes are always checked. `verify_hashes=False` skips the SHA-256 check, for large bundles
        on trusted disks. Files may be links, as in a cache of Hugging Face; the hash of a file
        outside the bundle's folder is always checked. Files that systems leave in folders
        (`STRAYS`) are ignored. Raises BundleError if a file is missing, altered or not listed in
        the manifest, or if a name leads out of the bundle.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(f"bundle: expected the path of a folder, found {path!r}")
        root = Path(path)
        try:
            found = _something_else(root)
        except OSError:
            found = None  # the manifest cannot be read either, for the same reason
        if found is not None:
            raise BundleError(f"{root}: expected a bundle (a directory), found {found}")
        manifest = read_manifest(root / MANIFEST_FILE)
        files = [graph.file for graph in manifest.graphs_of_parts]
        files += [engine.file for engine in manifest.engines_of_parts]
        files += [] if manifest.text is None else [manifest.text.tokenizer]
        for file in files:
            if file is not None and file not in manifest.files:
                raise BundleError(f"{root}: {file} is not among the manifest's files; rebuild the bundle")
        for present in sorted(path for folder in FOLDERS for path in (root / folder).glob("*")):
            name = present.relative_to(root).as_posix()
            if name not in manifest.files and not any(fnmatchcase(present.name, form) for form in STRAYS):
                raise BundleError(
                    f"{root}: file {name} is not among the manifest's files: remove it, or copy the bundle again"
                )
        checked = {}
        for name, facts in manifest.files.items():
            try:
                checked[name] = _check_file(root, name, facts, verify_hashes)
            except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for a loop of links
                raise BundleError(
                    f"{root}: file {name!r} cannot be read ({error}); copy the bundle again or rebuild it"
                ) from None
        return cls(root, manifest, checked)

    def at(self, height: int, width: int) -> "Bundle":
        """Return the bundle as one of another size; see `Manifest.at`."""
        return self._as(self.manifest.at(height, width))

    @property
    def views(self) -> "tuple[Bundle, ...]":
        """The bundle as one of each size that it was built for, this one first."""
        return tuple(map(self._as, self.manifest.views))

    def _as(self, manifest: Manifest) -> "Bundle":
        """Return the bundle with another manifest."""
        made = copy(self)  # `replace` would look for the root again, in the present working folder
        object.__setattr__(made, "manifest", manifest)
        return made

    @contextmanager
    def reading(self, *names: str) -> Iterator[None]:
        """Check before and after the block, which reads these files, that they are those checked.

        Raises BundleError if a file has other content than when the bundle was opened.
        """
        self.check_unchanged(*names)
        try:
            yield
        finally:
            self.check_unchanged(*names)

    def check_unchanged(self, *names: str, mapped: bool = False) -> None:
        """Raise BundleError if a file has other content than when the bundle was opened.

        mapped: whether the files are mapped into memory. A mapped file outlives its replacement, so
        only a file that was written in place counts as changed.
        """
        for name in names:
            before, now = self.checked.get(name), state_of(self.root / name)
            if before is None or now == before or (mapped and now[:2] != before[:2]):
                continue
            try:
                self.checked[name] = _check_file(self.root, name, self.manifest.files[name], True)
            except (BundleError, OSError, RuntimeError):
                raise BundleError(
                    f"{self.path}: file {name} was changed after the bundle was loaded: load the bundle again"
                ) from None

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists."""
        return self.root / name

    def onnx(self, graph: GraphFacts) -> Path:
        """Return the path of a graph's ONNX file. Raises BundleError if the graph has none."""
        if graph.file is None:
            raise BundleError(
                f"{self.path}: expected ONNX graphs, found only engines; rebuild it with `keep_onnx`, "
                f"or for ONNX Runtime"
            )
        return self.root / graph.file


def _something_else(root: Path) -> str | None:
    """Return what is at `root` and what to give instead; None if it may be a bundle."""
    if (root / MANIFEST_FILE).is_file():
        return None
    inside = next((parent for parent in root.absolute().parents if (parent / MANIFEST_FILE).is_file()), None)
    if (
        inside is not None
        and root.exists()
        and root.absolute().relative_to(inside).parts[0] in (MANIFEST_FILE, *FOLDERS)
    ):
        return f"a part of one; give {inside}"
    make = "make one with sg-export build"
    if not root.is_dir():
        if root.suffix in CHECKPOINTS and root.exists():
            return f"a checkpoint; {make} {root}"
        if re.match(r"\w+:/", str(root)):
            return "an address; download the bundle and give its folder"
        return f"a file; {make}" if root.exists() else f"nothing there; {make}"
    for name, owner in (("model_index.json", "a Diffusers pipeline"), ("config.json", "a model of another library")):
        if (root / name).is_file():
            return f"{owner} ({name}); {make} from a checkpoint of tread, MaskDiT or PRX"
    held = sorted(root.iterdir())
    bundles = [str(path) for path in held if (path / MANIFEST_FILE).is_file()]
    if bundles:
        return f"a folder of bundles; give {' or '.join(bundles[:3])}"
    checkpoints = [path for path in held if path.suffix in CHECKPOINTS]
    return f"a folder of checkpoints; {make} {checkpoints[0]}" if checkpoints else None


def _check_file(root: Path, name: str, facts: FileFacts, verify_hash: bool) -> tuple[int, ...]:
    """Return the state of a file that agrees with its facts. Raises BundleError if it does not."""
    relative = PurePosixPath(name)
    target = root / name
    inside = not relative.is_absolute() and ".." not in relative.parts and "\\" not in name and "\0" not in name
    if not inside:
        raise BundleError(f"{root}: file {name!r} points outside the bundle; do not use this bundle")
    if not target.is_file():
        if target.is_symlink():
            raise BundleError(
                f"{root}: file {name} is a link to {target.readlink()}, where no file is: copy the bundle with the "
                f"files that its links lead to (cp -rL, or snapshot_download with local_dir=)"
            )
        raise BundleError(f"{root}: file {name} is missing; copy the bundle again or rebuild it")
    state, size = state_of(target), target.stat().st_size
    if size != facts.size:
        raise BundleError(
            f"{root}: file {name}: expected {facts.size} bytes, found {size}; copy the bundle again or rebuild it"
        )
    verify_hash = verify_hash or not target.resolve().is_relative_to(root.resolve())
    if verify_hash and (found := sha256_of(target)) != facts.sha256:
        raise BundleError(
            f"{root}: file {name}: expected SHA-256 {facts.sha256[:12]}…, found {found[:12]}…; "
            f"it was altered after the build: copy the bundle again or rebuild it"
        )
    if state_of(target) != state:
        raise BundleError(f"{root}: file {name} changed while it was read: try again when the bundle is complete")
    return state
