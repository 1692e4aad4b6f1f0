"""A model repository of Triton: the folder of a model with its configuration, code and bundle."""

import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

from sg_export.packing.folder import check_place, foreign_files, new_folder, own_files
from sg_export.serving.engine import check_servable
from sg_export.triton.config import MARK, WARMUP_PROMPT, Settings, model_config
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.manifest import MANIFEST_FILE, Labels
from sg_runtime.triton import BUNDLE_FOLDER

CONFIG_FILE = "config.pbtxt"

VERSION = "1"
"""Name of the version's folder."""

MODEL_FILE = '''"""The model of {name}, which Triton's Python backend imports. Written by sg-export."""

from sg_runtime.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    bundle: Path,
    repository: Path,
    settings: Settings | None = None,
    *,
    name: str | None = None,
    link: bool = False,
    force: bool = False,
) -> Path:
    """Write the model of a bundle into a model repository. Return the model's folder.

    repository: folder of the repository. It is made if it is missing, and may hold other models.
    name: name of the model; by default that of the bundle's folder.
    link: whether the model has a symbolic link to the bundle instead of a copy.
    force: whether to replace a model of this name that sg-export wrote.

    If it fails, an existing model is kept. Raises BundleError for a damaged bundle, UsageError for
    a bundle without pictures, for wrong settings and for a folder that may not be replaced, and
    ExportError if the disk is full.
    """
    settings = settings or Settings()
    opened = Bundle.open(bundle)
    check_servable(opened)
    name = opened.root.resolve().name if name is None else name
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name) is None:
        raise UsageError(f"name: expected letters, digits and . _ - for Triton, found {name!r}: give another `name`")
    config = model_config(name, opened, settings)
    check_repository(repository)
    model = repository / name
    check_model(model, force, [opened.root])
    check_place(model)
    with new_folder(model, force, [opened.root], check=check_model) as folder:
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        version = folder / VERSION
        version.mkdir()
        (version / "model.py").write_text(MODEL_FILE.format(name=name), encoding="utf-8")
        _add_bundle(opened, version / BUNDLE_FOLDER, link)
        if not isinstance(opened.manifest.model.conditions, Labels):
            (folder / "warmup").mkdir()
            (folder / "warmup" / WARMUP_PROMPT).write_bytes(_bytes_tensor("a photo"))
    return model


def check_repository(repository: Path) -> None:
    """Raise UsageError if a folder exists that is no model repository.

    A repository holds nothing but folders of models, each with a `config.pbtxt`.
    """
    if not repository.exists():
        return
    if not repository.is_dir():
        raise UsageError(f"{repository}: expected a folder, found a file: give another `output`")
    for path in sorted(repository.iterdir()):
        if not path.name.startswith(".") and not (path / CONFIG_FILE).is_file():
            raise UsageError(
                f"{repository}: expected a model repository, which holds only folders of models, found {path.name} "
                f"without {CONFIG_FILE}: give another `output`"
            )


def check_model(model: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise UsageError if the folder of a model exists and may not be replaced.

    It may be replaced only with `force`, and only if sg-export wrote all of it. It may not hold one
    of `inputs`.
    """
    if not model.exists():
        return
    if not force:
        raise UsageError(f"{model}: exists: give another `output` or `name`, or `force` to replace it")
    for path in inputs:
        if path.resolve().is_relative_to(model.resolve()):
            raise UsageError(f"{model}: holds the bundle {path}: give another `output` or `name`")
    config = model / CONFIG_FILE
    if not config.is_file() or not config.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise UsageError(
            f"{model}: exists and is not a model of sg-export triton, so `force` does not replace it: give another "
            f"`output` or `name`"
        )
    bundle = model / VERSION / BUNDLE_FOLDER
    own = {CONFIG_FILE, f"warmup/{WARMUP_PROMPT}", f"{VERSION}/model.py", f"{VERSION}/{BUNDLE_FOLDER}"}
    own |= {path.relative_to(model).as_posix() for path in model.glob(f"{VERSION}/__pycache__/model.*.pyc")}
    own |= {f"{VERSION}/{BUNDLE_FOLDER}/{name}" for name in own_files(bundle)}
    if foreign := foreign_files(model, own):
        raise UsageError(
            f"{model}: expected only files of sg-export triton, found {', '.join(foreign[:8])}: `force` would delete "
            f"them: move them, or give another `output`"
        )


def _add_bundle(bundle: Bundle, folder: Path, link: bool) -> None:
    """Put a bundle into a folder: a link to it, or copies of the files that its manifest lists."""
    if link:
        folder.symlink_to(bundle.root.resolve(), target_is_directory=True)
        return
    with bundle.reading(*bundle.manifest.files):
        for name in (MANIFEST_FILE, *bundle.manifest.files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.root / name, folder / name)


def _bytes_tensor(text: str) -> bytes:
    """Return a tensor of one text in the form of Triton's files of data: length, then UTF-8."""
    data = text.encode()
    return struct.pack("<I", len(data)) + data
