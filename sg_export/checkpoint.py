"""Reader of checkpoint files.

A checkpoint is read as one flat dict of tensors, and the facts that tensor shapes do not show.
"""

import argparse
import ctypes
import json
import logging
import mmap
import os
import pickle
import re
import zipfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sg_export.diffusers_folder import find_configs, find_weights, read_config
from sg_export.recognize import DOWNLOAD, listed, what_file_is, what_is
from sg_export.reference import REFERENCES, place_of
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import Prediction, Route, Source

LOG = logging.getLogger(__name__)

METADATA_KEY = "sg_export"

BESIDE = "ema_denoiser"
"""First word of averaged weights in Photoroom/PRX, whose other weights are not all averaged.

The family's adapter tells them apart.
"""

_DENOISER = re.compile(r"(.*\.)?(?:ema_denoiser\.model|denoiser)")
"""Key of a denoiser in Photoroom/PRX, with the key of what it lies in."""

_EMBEDDER = "resolution_embedder"
"""Key next to the denoisers, under which earlier files of Photoroom/PRX hold a part of both."""

_MODEL_KEYS = ("model_state_dict", "model", "state_dict", "params", "module", "net", "network")
_WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
_PREFIX = re.compile(rf"^(({_WRAPPERS}|model)\.)+")
_INSIDE = re.compile(rf"(?<=\.)({_WRAPPERS})\.")


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """Facts that a checkpoint's author may state.

    They are read from safetensors metadata (key "sg_export") and from a .json file next to the
    checkpoint. The .json file takes precedence.

    family: name of the adapter, a key of `sg_export.adapters.ADAPTERS`.
    heads: number of attention heads.
    route: first and last block that run on the kept tokens, both included, as "2-24".
    selection_rate: sparsity during training.
    prediction: what the network predicts.
    space: whether the samples are pixels or latents.
    class_names: names of the classes, in the order of their indices.
    size: height and width of the picture, in pixels; for models that sample several sizes.
    text_tokens: number of tokens of a prompt, with padding.
    channels, patch: channels of a sample, and side of the square that one token covers.
    pixels_per_latent: height and width of the square of the picture that one latent decodes to.
    time_shift: shift of the times of a run; see `sg_runtime.manifest.Shifted`.
    noise_scale: standard deviation of the noise in training.
    training: free text and numbers about the training.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    family: str | None = None
    heads: int | None = None
    route: str | None = None
    selection_rate: float | None = None
    prediction: Prediction | None = None
    space: Literal["pixel", "latent"] | None = None
    class_names: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    text_tokens: int | None = None
    channels: int | None = None
    patch: int | None = None
    pixels_per_latent: int | None = None
    time_shift: float | None = None
    noise_scale: float | None = None
    training: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Overrides:
    """Facts that the user states about a checkpoint. They take precedence over its own facts.

    size: height and width of the picture, in pixels.
    """

    route: Route | None = None
    heads: int | None = None
    prediction: Prediction | None = None
    size: tuple[int, int] | None = None
    text_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a checkpoint file, or of a folder of diffusers.

    source: name and hash.
    tensors: tensors by their names without wrappers. They are in memory, not in the file.
    facts: facts that the author states.
    prefix: longest wrapper prefix that was removed from a name.
    configs: configurations in a folder by component; see `sg_export.diffusers_folder`.
    """

    source: Source
    tensors: Mapping[str, Tensor]
    facts: CheckpointFacts
    prefix: str
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a checkpoint.

    weights: files of tensors.
    index: list of the tensors in each of several files; None for one file without a list.
    configs: configurations in a folder of diffusers, by component.
    variant: variant of the weights in such a folder; None for weights without a variant.
    """

    weights: tuple[Path, ...]
    index: Path | None = None
    configs: Mapping[str, Path] = field(default_factory=dict)
    variant: str | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """All files, in the order in which they are hashed."""
        return (*self.configs.values(), *([self.index] if self.index else []), *self.weights)


def read_checkpoint(checkpoint: str | Path, weights: str | None = None, sha256: str | None = None) -> Checkpoint:
    """Read a file, an index of shards, a folder of diffusers, or a reference model by name.

    The content of a file tells its format, not the suffix: it is of torch.save or safetensors.
    Pickles are read only with `weights_only=True`.

    weights: the set of weights to read: "ema", "model", or the key of a dict of tensors or of a
    prefix of their names, with dots between nested keys. The default is the EMA set if there is
    one. In a folder it is a variant of the weights.
    sha256: hash of the files, if it was just taken.

    Raises CheckpointError for a file that is missing, damaged, not safe to read, or that changes
    while it is read. Raises UsageError if the file does not hold `weights`.
    """
    reference = str(checkpoint) if str(checkpoint) in REFERENCES else None
    path = place_of(checkpoint)
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected a checkpoint file, a folder of diffusers or the name of a reference model "
            f"({', '.join(REFERENCES)}), found {what_is(str(checkpoint))}"
        )
    try:
        files = checkpoint_files(path, weights)
        with _unchanged(files.all, sha256_of(*files.all) if sha256 is None else sha256) as digest:
            configs = {component: read_config(config) for component, config in files.configs.items()}
            content, stated = _read_all(files)
            facts = _over(stated, CheckpointFacts(family="prx" if configs else None))
            if configs:
                chosen, tensors = files.variant or "bare", _state_of(content)
            else:
                chosen, tensors = _choose_set(path, content, weights)
            tensors = _in_memory(tensors)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    sidecar = sidecar_of(path)
    if sidecar.is_file():
        facts = _over(_facts_beside(sidecar, path), facts)
    plain, prefix = _without_wrappers(path, tensors)
    return Checkpoint(Source(path.resolve().name, digest, chosen, reference), plain, facts, prefix, configs)


def read_part(files: Files) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of another part of a pipeline, by their names without wrappers.

    The second result is the hash of all files. Raises CheckpointError for files that are missing or
    damaged, or that change while they are read.
    """
    try:
        with _unchanged(files.all, sha256_of(*files.all)) as digest:
            tensors = _in_memory(_state_of(_read_all(files)[0]))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror or error})") from None
    return _without_wrappers(files.weights[0], tensors)[0], digest


def _read_all(files: Files) -> tuple[Mapping[Any, Any], CheckpointFacts]:
    """Return what all files of weights hold, and the facts that they state."""
    content: Mapping[Any, Any] = {}
    facts = CheckpointFacts()
    names: dict[str, set[str]] = {}
    for file in files.weights:
        part, stated = _read(file)
        names[file.name] = {str(name) for name in part}
        content, facts = {**content, **part}, _over(stated, facts)
    if files.index is not None:
        _check_index(files.index, names)
    return content, facts


def sidecar_of(path: Path) -> Path:
    """Return the place of the JSON file with facts about a checkpoint, next to it."""
    if path.is_dir():
        place = path.resolve()
        return place.with_name(f"{place.name}.json")
    return path.with_name(path.name.removesuffix(".index.json")).with_suffix(".json")


def checkpoint_files(path: Path, weights: str | None = None) -> Files:
    """Return the files of a checkpoint: `path`, an index with its shards, or those of a folder.

    weights: variant of the weights in a folder of diffusers.

    Raises CheckpointError if `path` is a shard, an index of shards that are not there, or a folder
    that is not supported. Raises UsageError for a variant that is not there.
    """
    configs: Mapping[str, Path] = {}
    variant = None
    if path.is_dir():
        configs = find_configs(path)
        path, variant = find_weights(configs["transformer"].parent, weights)
    if (shard := re.search(r"-[0-9]{5}-of-([0-9]{5})\.", path.name)) and int(shard[1]) > 1:
        raise CheckpointError(
            f"{path}: one of {int(shard[1])} shards: give the index that lists them, a file that ends in .index.json"
        )
    with path.open("rb") as stream:
        if stream.read(64).removeprefix(BOM_UTF8).lstrip()[:1] != b"{":
            return Files((path,), None, configs, variant)
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        shards = tuple(path.parent / name for name in names)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if configs:
            read_config(path)
        return Files((path,), None, configs, variant)
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path}: expected its shards in the same folder, found {listed(outside)}")
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{path}: expected its shards in the same folder, found no {listed(absent)}")
    return Files(shards, path, configs, variant)


def _check_index(index: Path, names: Mapping[str, set[str]]) -> None:
    """Raise CheckpointError unless each shard holds the tensors that an index lists for it.

    names: names of the tensors by the name of their file.
    """
    for tensor, file in json.loads(index.read_bytes())["weight_map"].items():
        if tensor not in names[file]:
            others = [other for other, held in names.items() if tensor in held]
            raise CheckpointError(
                f"{index}: expected {tensor} in {file}, found it in {listed(others) if others else 'no shard'}: fetch "
                f"index and shards again"
            )


@contextmanager
def _unchanged(files: Sequence[Path], sha256: str) -> Iterator[str]:
    """Yield `sha256`, the hash of the files, and take the hash again after the block.

    Raises CheckpointError if it differs. This error replaces any error of the block.
    """
    try:
        yield sha256
    finally:
        if sha256_of(*files) != sha256:
            raise CheckpointError(
                f"{files[0]}: changed while it was read: wait until it is complete, or give a copy of it"
            ) from None


def _over(first: CheckpointFacts, second: CheckpointFacts) -> CheckpointFacts:
    """Return the facts of `first`, completed by those of `second`."""
    values = {field.name: getattr(first, field.name) for field in fields(CheckpointFacts)}
    return replace(second, **{name: value for name, value in values.items() if value is not None})


def parse_facts(text: str, where: str) -> CheckpointFacts:
    """Parse facts strictly from JSON.

    where: place of the text, for the error. Raises CheckpointError for the first invalid key.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(CheckpointFacts).validate_json(text.removeprefix("\ufeff"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        known = ", ".join(field.name for field in fields(CheckpointFacts))
        raise CheckpointError(f"{where}: {key}: {first['msg']}; the known keys are {known}") from None


def _facts_beside(path: Path, checkpoint: Path) -> CheckpointFacts:
    """Return the facts in the JSON file next to a checkpoint.

    A JSON object without a key like one of them is another tool's file. It is left alone, with a
    warning. Raises CheckpointError for anything else that is not facts.
    """
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    known = [field.name for field in fields(CheckpointFacts)]
    if isinstance(content, dict) and content and not any(get_close_matches(key, known) for key in content):
        LOG.warning(
            "%s: not read as facts about %s, which has its name: expected %s, found %s",
            *(path, checkpoint.name, ", ".join(known), listed(list(content))),
        )
        return CheckpointFacts()
    try:
        return parse_facts(text, str(path))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; it was read as facts about {checkpoint.name}, which has its name: if it is another tool's file, "
            f"rename it"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected checkpoint facts as JSON, cannot read the file ({error})") from None


def _read(path: Path) -> tuple[Mapping[Any, Any], CheckpointFacts]:
    """Read one file by the reader for its first bytes, or else for its suffix."""
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file: {DOWNLOAD}")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    if (found := what_file_is(path, start)) is not None:
        raise CheckpointError(f"{path}: expected a checkpoint, found {found}")
    if path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80")):
        return _read_safetensors(path)
    return _read_pickle(path), CheckpointFacts()


def _read_safetensors(path: Path) -> tuple[Mapping[Any, Any], CheckpointFacts]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({error}); copy it again") from None
    text = metadata.get(METADATA_KEY)
    return tensors, CheckpointFacts() if text is None else parse_facts(text, f"{path}, metadata {METADATA_KEY}")


def _plain_values() -> list[Any]:
    """Return what trainers store beside weights: parsed options, and NumPy's scalars and arrays.

    They only hold values: making one runs no code of the file.
    """
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    old = [(scalar, "numpy.core.multiarray.scalar"), (rebuild, "numpy.core.multiarray._reconstruct")]
    types = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return [argparse.Namespace, scalar, rebuild, *old, np.ndarray, np.dtype, *types]


def _read_pickle(path: Path) -> Mapping[Any, Any]:
    mapped = zipfile.is_zipfile(path)
    if mapped and not any(name.endswith("data.pkl") for name in _zip_names(path)):
        raise CheckpointError(f"{path}: expected a checkpoint, found a zip archive of {listed(_zip_names(path))}")
    if path.suffix == ".safetensors":  # PyTorch's reader would go by this suffix
        raise CheckpointError(f"{path}: expected safetensors, found a file of torch.save: name it .pt")
    try:
        with torch.serialization.safe_globals(_plain_values()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to read the file without this check, so it is not shown.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "PyTorch's weights_only reader does not know its instructions"
        raise CheckpointError(
            f"{path}: refused: it is damaged, or holds more than tensors and plain values, so that reading it would "
            f"run its code ({reason}); save only its state dict, with torch.save or as safetensors"
        ) from None
    except Exception as error:  # damaged bytes can raise any exception in PyTorch's reader
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise CheckpointError(f"{path}: damaged, or not a PyTorch file ({reason}); copy it again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


def _zip_names(path: Path) -> list[str]:
    try:
        return zipfile.ZipFile(path).namelist()
    except Exception:  # a damaged archive is left to PyTorch's reader
        return ["data.pkl"]


def _in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with storages of their own in place of maps of the file.

    If the file is cut, a process that touches its map dies. So the kernel copies the map, through a
    pipe: it reports an error instead. Raises OSError.
    """
    storages: dict[tuple[int, int], torch.UntypedStorage] = {}
    copied = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or (mapped := tensor.untyped_storage()).resizable():
            copied[name] = tensor  # not a map, or of a layout that no adapter takes
            continue
        key = mapped.data_ptr(), mapped.nbytes()
        if key not in storages:
            storages[key] = _copy(mapped)
        own = torch.empty(0, dtype=tensor.dtype)
        copied[name] = own.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
    return copied


def _copy(mapped: torch.UntypedStorage) -> torch.UntypedStorage:
    size = mapped.nbytes()
    own = torch.empty(size, dtype=torch.uint8).untyped_storage()
    if size == 0:
        return own
    source, target = (
        memoryview((ctypes.c_char * size).from_address(storage.data_ptr())).cast("B") for storage in (mapped, own)
    )
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        done = 0
        while done < size:
            sent = os.write(writing, source[done : done + (1 << 16)])
            end = done + sent
            while done < end:
                done += os.readv(reading, [target[done:end]])
    finally:
        os.close(reading)
        os.close(writing)
    _let_go(mapped)
    return own


def _let_go(mapped: torch.UntypedStorage) -> None:
    """Give the pages of a map back to the kernel: until then, they count as memory of this process.

    Pages that the map shares with its neighbours stay. The kernel reads a page again if it is used.
    """
    first, size = mapped.data_ptr(), mapped.nbytes()
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _flat(content: Any, depth: int = 8) -> dict[str, Tensor]:
    """Return the tensors of nested dicts by their keys, joined with dots."""
    found = {}
    if isinstance(content, Mapping) and depth:
        for key, value in content.items():
            if isinstance(value, Tensor):
                found[str(key)] = value
            else:
                found.update({f"{key}.{name}": tensor for name, tensor in _flat(value, depth - 1).items()})
    return found


def _state_of(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a dict, and of dicts in it unless it is a state dict itself."""
    if not isinstance(content, Mapping):
        return {}
    direct = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return direct if any("." in name for name in direct) else _flat(content)


def _under(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `key` and a dot, by the rest of their names."""
    return {name[len(key) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}


def _by_key(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under a key, and of a denoiser also the embedder next to it."""
    named = _under(key, tensors)
    if named and (denoiser := _DENOISER.fullmatch(key)):
        beside = _under(f"{denoiser[1] or ''}{_EMBEDDER}", tensors)
        named = {f"{_EMBEDDER}.{name}": tensor for name, tensor in beside.items()} | named
    return named


def _sets_of(content: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the sets of a file by their names "ema" and "model", or all its tensors as "bare"."""
    sets: dict[str, dict[str, Tensor]] = {}
    for key in ("ema_state_dict", "ema", *(key for key in content if _is_ema(key)), *_MODEL_KEYS):
        state = _state_of(content.get(key))
        if key == "state_dict" and all(name.startswith("model.") for name in state):
            state = _under("model", state)  # Lightning names the attribute that holds the network
        if state:
            sets = {**_split(state, "ema" if _is_ema(key) else "model"), **sets}
    return sets or _split(_state_of(content), "bare")


def _split(state: Mapping[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """Return the sets that the first words of names tell apart, or the single set `name`."""
    words = dict.fromkeys(tensor.partition(".")[0] for tensor in state if "." in tensor)
    averaged = next(filter(_is_ema, words), None)
    if averaged in (None, BESIDE):
        return {name: dict(state)}
    plain = {n: tensor for n, tensor in state.items() if not _is_ema(n.partition(".")[0])}
    others = {} if name == "ema" else {"model": _under("model", plain) or plain}
    return {"ema": _under(averaged, state), **{kind: found for kind, found in others.items() if found}}


def _is_ema(key: Any) -> bool:
    """Return whether `key` names averaged weights, such as "ema", "model_ema" and "ema_0.9999"."""
    words = re.split("[^a-z]+", str(key).lower())
    return "ema" in words and not {"optimizer", "opt", "scheduler"} & {*words}


def _is_nameless(value: Any) -> bool:
    """Return whether `value` is a list of tensors, or a dict of such a list without named ones."""
    if isinstance(value, Mapping):
        return not _flat(value) and any(_is_nameless(item) for item in value.values() if not isinstance(item, Mapping))
    return isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value)


def _choose_set(path: Path, content: Mapping[Any, Any], weights: str | None) -> tuple[str, dict[str, Tensor]]:
    """Return the requested set of tensors with its name."""
    sets = _sets_of(content)
    default = "ema" if "ema" in sets else next(iter(sets))
    if weights is None or weights in sets:
        chosen = weights or default
        nameless = [str(key) for key, value in content.items() if _is_ema(key) and _is_nameless(value)]
        if nameless and weights is None and chosen != "ema":
            raise UsageError(
                f"{path}: {nameless[0]}: expected tensors by their names, found a list: save the averaged model's "
                f"state dict, or give `weights` model for the weights that are not averaged"
            )
        if not sets[chosen]:
            found = f"other values: {listed([str(key) for key in content])}" if content else "nothing"
            raise CheckpointError(f"{path}: expected tensors by their names, found {found}")
        return chosen, sets[chosen]
    flat = _flat(content)
    if named := _by_key(weights, flat) or _by_key(weights, sets[default]):
        return weights, named
    if weights not in ("ema", "model"):
        keys = list(dict.fromkeys(name.partition(".")[0] for name in flat if "." in name))
        raise UsageError(
            f"{path}: expected tensors under {weights}, found them under {listed(keys)}: give one of them as `weights`"
        )
    if "bare" in sets:
        raise UsageError(f"{path}: holds a single bare state dict: leave out `weights` {weights}")
    raise UsageError(f"{path}: expected {weights} weights, found {' and '.join(sets)}: give `weights` {default}")


def _without_wrappers(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the tensors by their names in the network, and the longest prefix that was removed.

    Wrappers are removed wherever they stand, and a first word that all names share. Single numbers
    without a module, such as a step, are not weights, and are left out.
    """
    shorts: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = _INSIDE.sub("", _PREFIX.sub("", name))
        if tensor.ndim or "." in short:
            shorts[name] = short
    while (
        len(shorts) > 1
        and all("." in short for short in shorts.values())
        and len({short.partition(".")[0] for short in shorts.values()}) == 1
    ):
        shorts = {name: _PREFIX.sub("", short.partition(".")[2]) for name, short in shorts.items()}
    plain: dict[str, Tensor] = {}
    for name, short in shorts.items():
        if short in plain:
            raise CheckpointError(f"{path}: two tensors are named {short} without wrappers: give one set by `weights`")
        plain[short] = tensors[name]
    return plain, max((match[0] for name in shorts if (match := _PREFIX.match(name))), key=len, default="")


def merge_facts(checkpoint: Checkpoint, overrides: Overrides) -> Overrides:
    """Return the user's facts about a checkpoint, completed by the facts that its author states."""
    facts = checkpoint.facts
    return Overrides(
        overrides.route or (Route.parse(facts.route) if facts.route else None),
        facts.heads if overrides.heads is None else overrides.heads,
        overrides.prediction or facts.prediction,
        overrides.size or facts.size,
        facts.text_tokens if overrides.text_tokens is None else overrides.text_tokens,
    )
