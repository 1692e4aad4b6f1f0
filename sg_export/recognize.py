"""Names for what is given in place of a checkpoint, with what to give instead."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sg_runtime.manifest import MANIFEST_FILE

OURS = "give a checkpoint of CompVis/tread, Anima-Lab/MaskDiT or PRX"
DOWNLOAD = "the download failed: fetch it again"
UNPACK = "unpack it first"

_STARTS: tuple[tuple[bytes, str], ...] = (
    (rb"\s*(<!doctype html|<html|<head)", f"a web page: {DOWNLOAD}, from the address of the file itself"),
    (rb"\s*<\?xml", f"an XML message: {DOWNLOAD}"),
    (rb"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with git lfs pull"),
    (rb"\s*[\[{]\s*[\"\[{}\]]", f"JSON that is no index of shards; if it is a server's message, {DOWNLOAD}"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|.{257}ustar", f"an archive: {UNPACK}"),
    (rb"GGUF", "a GGUF file: take the checkpoint that it was made from"),
    (rb"\x89HDF", "an HDF5 file: save its tensors with torch.save or as safetensors"),
    (rb"\x93NUMPY", "a NumPy array: save the tensors with torch.save or as safetensors"),
    (rb"[\t\n\r -~]{16,}\Z", f"a text; if a server wrote it, {DOWNLOAD}"),
)
"""What other files are, by the pattern of their first bytes."""

_JSON: tuple[tuple[str, str], ...] = (
    ("_class_name", f"the configuration of a Diffusers model, {{}}: of a PRX give the folder, else {OURS}"),
    ("_diffusers_version", f"the configuration of a Diffusers model: {OURS}"),
    ("architectures", f"the configuration of a Transformers model: {OURS}"),
    ("schema_version", "the manifest of a bundle or another file of sg-export: give the checkpoint itself"),
    ("route", "facts about a checkpoint: give the checkpoint itself"),
    ("prediction", "facts about a checkpoint: give the checkpoint itself"),
)
"""What a JSON object is, by a key of it. `{}` is the value of the key."""

_LAYOUTS: tuple[tuple[str, str], ...] = (
    (r"lora_|\.lora\.", f"a LoRA: merge it into its model, and {OURS}"),
    (
        r"^(\w*model\.|module\.)*transformer_blocks\.",
        f"a transformer in the layout of Diffusers: {OURS}, before it was converted",
    ),
    (r"(^|\.)(double|single|joint)_blocks\.", f"a text-to-image transformer (Flux, SD 3): {OURS}"),
    (r"(^|model\.|unet\.)(down|up|input|output)_blocks\.", f"a U-Net: {OURS}"),
    (r"(^|\.)(encoder|decoder)\.(down|up|mid)(_blocks?)?\.", f"an autoencoder: {OURS}"),
    (r"(^|\.)text_model\.|(^|\.)encoder\.layers?\.", f"a text or image encoder: {OURS}"),
    (r"(^|\.)exp_avg(_sq)?$", "the state of an optimizer: give the file of the weights"),
)
"""What other networks are, by a pattern that one of their tensors' names has."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the names as text, the first `most` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def what_is(checkpoint: str) -> str:
    """Return what is at a path that is not a file, with the file or the step that helps."""
    path = Path(checkpoint)
    if re.match(r"\w+://", checkpoint):
        return "an address: download the file, and give its path"
    if not path.is_dir():
        return "nothing there"
    if indexes := sorted(path.glob("*.index.json")):
        return f"a folder: give the index in it, {indexes[0]}"
    if (path / MANIFEST_FILE).is_file():
        return "a bundle, which a build has made: give the checkpoint"
    if (path / ".metadata").is_file():
        return (
            "a folder of torch.distributed.checkpoint: turn it into a file with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    if (path / "zero_to_fp32.py").is_file():
        return f"a folder of DeepSpeed: turn it into a file with python {path / 'zero_to_fp32.py'} {path} FILE"
    if (path.parent / "model_index.json").is_file():
        return f"a part of a Diffusers pipeline: give its folder, {path.parent}"
    names = sorted(entry.name for entry in path.iterdir())
    return f"a folder of {listed(names)}" if names else "an empty folder"


def what_file_is(path: Path, start: bytes) -> str | None:
    """Return what a file is that is no checkpoint; None if it may be one.

    start: its first bytes.
    """
    start = start.removeprefix(b"\xef\xbb\xbf")
    if re.match(rb"\s*\{", start):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            content = None
        if (known := _what_json_is(content)) is not None:
            return known
    return next((found for form, found in _STARTS if re.match(form, start, re.IGNORECASE | re.DOTALL)), None)


def _what_json_is(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    return next((found.format(content[key]) for key, found in _JSON if key in content), None)


def what_network_is(names: Iterable[str]) -> str | None:
    """Return what a network is, by the names of its tensors; None if it is not known."""
    found = list(names)
    return next((kind for form, kind in _LAYOUTS if any(re.search(form, name) for name in found)), None)
