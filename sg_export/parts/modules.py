"""What text encoders and decoders have in common: how their folders become modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sg_export.checkpoint import Files, checkpoint_files
from sg_export.diffusers_folder import find_weights
from sg_export.recognize import listed
from sg_runtime.errors import CheckpointError, SgError
from sg_runtime.manifest import Source


def find_part(folder: Path, configs: Mapping[str, Path], variant: str | None, stem: str) -> Files:
    """Return the files of weights in the folder of a part, together with what else is read.

    configs: files that are read besides the weights. stem: see `find_weights`.
    """
    weights, chosen = find_weights(folder, variant, stem)
    files = checkpoint_files(weights)
    return Files(files.weights, files.index, configs, chosen)


def source_of(folder: Path, files: Files, sha256: str) -> Source:
    """Return name and hash of the files of a part, which `folder` was given for."""
    return Source(folder.resolve().name, sha256, files.variant or "bare", None)


@contextmanager
def refused_by(library: ModuleType, subject: Path) -> Iterator[None]:
    """Turn an error of a library about a file into CheckpointError, within the block."""
    try:
        yield
    except SgError:
        raise
    except Exception as error:  # these libraries raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{subject}: {library.__name__} {library.__version__} cannot read it: {reason}"
        ) from error


def without_weights(make: Callable[[], nn.Module]) -> Any:
    """Return a module whose parameters have no memory yet."""
    with torch.device("meta"):
        return make()


def fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Give a module its tensors, in FP32. Empties `tensors`, so that memory holds each once.

    Raises CheckpointError if a name or a shape differs, or a tensor holds no real numbers.
    """
    wanted = module.state_dict()
    for problem, names in (
        ("no", [name for name in wanted if name not in tensors]),
        ("the unknown", [name for name in tensors if name not in wanted]),
    ):
        if names:
            raise CheckpointError(
                f"{folder}: expected the tensors of its config.json, found {problem} {listed(names)}: fetch it again"
            )
    for name, tensor in wanted.items():
        found = tensors[name]
        if found.shape != tensor.shape or not found.is_floating_point():
            raise CheckpointError(
                f"{folder}: {name}: expected numbers of shape {tuple(tensor.shape)}, as in config.json, found "
                f"{found.dtype} of {tuple(found.shape)}"
            )
    module.load_state_dict({name: tensors.pop(name).float() for name in wanted}, assign=True)
    module.eval().requires_grad_(False)
