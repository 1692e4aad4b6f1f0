"""Open a bundle: a directory with a manifest. All files are checked before any is used."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sg_runtime.errors import BundleError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import MANIFEST_FILE, FileFacts, GraphFacts, Manifest, read_manifest

PARTS = (MANIFEST_FILE, "graphs", "engines")
"""Names in the folder of a bundle."""

CHECKPOINTS = (".pt", ".pth", ".safetensors")
"""Ends of the names of checkpoints."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose files have been checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify_hashes: bool = True) -> "Bundle":
        """Read the manifest of the bundle at `path` and check its files.

        Sizes are always checked. `verify_hashes=False` skips the SHA-256 check, for large bundles
        on trusted disks. Raises BundleError if a file is missing, altered, not listed in the
        manifest, or outside the bundle.
        """
        root = Path(path)
        try:
            found = _something_else(root)
        except OSError:
            found = None  # the manifest cannot be read either, for the same reason
        if found is not None:
            raise BundleError(f"{root}: expected a bundle (a directory), found {found}")
        manifest = read_manifest(root / MANIFEST_FILE)
        for file in (*(graph.file for graph in manifest.graphs), *(engine.file for engine in manifest.engines)):
            if file is not None and file not in manifest.files:
                raise BundleError(f"{root}: {file} is not among the manifest's files; rebuild the bundle")
        for present in sorted(path for folder in ("graphs", "engines") for path in (root / folder).glob("*")):
            if (name := present.relative_to(root).as_posix()) not in manifest.files:
                raise BundleError(f"{root}: file {name} is not among the manifest's files; rebuild the bundle")
        for name, facts in manifest.files.items():
            try:
                _check_file(root, name, facts, verify_hashes)
            except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for a loop of links
                raise BundleError(
                    f"{root}: file {name!r} cannot be read ({error}); copy the bundle again or rebuild it"
                ) from None
        return cls(root, manifest)

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists."""
        return self.path / name

    def onnx(self, graph: GraphFacts) -> Path:
        """Return the path of a graph's ONNX file. Raises BundleError if the graph has none."""
        if graph.file is None:
            raise BundleError(
                f"{self.path}: expected ONNX graphs, found only engines; rebuild it with --keep-onnx or "
                f"--target onnxruntime"
            )
        return self.path / graph.file


def _something_else(root: Path) -> str | None:
    """Return what is at `root` and what to give instead; None if it may be a bundle."""
    if (root / MANIFEST_FILE).is_file():
        return None
    inside = next((parent for parent in root.absolute().parents if (parent / MANIFEST_FILE).is_file()), None)
    if inside is not None and root.exists() and root.absolute().relative_to(inside).parts[0] in PARTS:
        return f"a part of one; give {inside}"
    make = "make one with sg-export build"
    if not root.is_dir():
        if root.suffix in CHECKPOINTS and root.exists():
            return f"a checkpoint; {make} {root}"
        return f"a file; {make}" if root.exists() else f"nothing there; {make}"
    for name, owner in (("model_index.json", "a Diffusers pipeline"), ("config.json", "a model of another library")):
        if (root / name).is_file():
            return f"{owner} ({name}); {make} from a checkpoint of tread or MaskDiT"
    held = sorted(root.iterdir())
    bundles = [str(path) for path in held if (path / MANIFEST_FILE).is_file()]
    if bundles:
        return f"a folder of bundles; give {' or '.join(bundles[:3])}"
    checkpoints = [path for path in held if path.suffix in CHECKPOINTS]
    return f"a folder of checkpoints; {make} {checkpoints[0]}" if checkpoints else None


def _check_file(root: Path, name: str, facts: FileFacts, verify_hash: bool) -> None:
    relative = PurePosixPath(name)
    target = root / name
    inside = not relative.is_absolute() and ".." not in relative.parts and "\\" not in name and "\0" not in name
    if not inside or not target.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{root}: file {name!r} points outside the bundle; do not use this bundle")
    if not target.is_file():
        raise BundleError(f"{root}: file {name} is missing; copy the bundle again or rebuild it")
    size = target.stat().st_size
    if size != facts.size:
        raise BundleError(
            f"{root}: file {name}: expected {facts.size} bytes, found {size}; copy the bundle again or rebuild it"
        )
    if verify_hash and (found := sha256_of(target)) != facts.sha256:
        raise BundleError(
            f"{root}: file {name}: expected SHA-256 {facts.sha256[:12]}…, found {found[:12]}…; "
            f"it was altered after the build: copy the bundle again or rebuild it"
        )
