"""Calibration data: states of real guided runs, stored on disk, on which ranges are measured.

A folder holds shards and a manifest that identifies the model, the settings and the guidances. Each
shard is a NumPy archive with one batch of images along one guided run. Kept tokens are not stored:
`sg_runtime.philox` draws them again from seed, step and evaluation.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sg_calibration.prompts import Prompts
from sg_calibration.settings import SEEDS, FeedSettings
from sg_runtime.conditions import Conditions, examples, of_classes, of_prompts
from sg_runtime.errors import CalibrationError, UsageError
from sg_runtime.files import replacing, sha256_of
from sg_runtime.manifest import GuidancePlan, Labels, Manifest, ModelFacts, size_text
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import integrate, trajectory

Array = NDArray[Any]
Split = Literal["calibration", "search", "gate"]

SHARDS_FILE = "feeds.json"
_PLACES: Mapping[Split, tuple[int, ...]] = {"calibration": (0, 1), "search": (2,), "gate": (3,)}
_SEEDS: Mapping[Split, int] = {"calibration": 0, "search": SEEDS, "gate": 2 * SEEDS}


@dataclass(frozen=True, slots=True)
class Shard:
    """A batch of B images along a run of E evaluations.

    x: state at each evaluation, (E, B, C, H, W) float32.
    time: t or sigma of each evaluation, (E,) float64.
    step: step of each evaluation, (E,) int64; a counter of the draw of kept tokens.
    evaluation: number of each evaluation within its step, (E,) int64; a counter of the same draw.
    seed: seed of each image, (B,) uint64.
    conditions: conditions of the images. A file holds the rows of the B images: "label" (B,) int64,
    with the number of classes for "no class", or for a text model "embeddings" (B, L, C) float32
    and "mask" (B, L) int64, and the same with "negative_" for the weak branch.
    """

    x: Array
    time: Array
    step: Array
    evaluation: Array
    seed: Array
    conditions: Conditions

    @property
    def counters(self) -> list[tuple[int, int]]:
        """Pair (step, evaluation) of each evaluation."""
        return [(int(step), int(number)) for step, number in zip(self.step, self.evaluation, strict=True)]


_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Exceptions that NumPy raises for a file that is not an archive of arrays."""

_Types = dict[str, tuple[str, tuple[int, ...]]]

_TYPES: _Types = {
    "x": ("float32", ()),
    "time": ("float64", ()),
    "step": ("int64", ()),
    "evaluation": ("int64", ()),
    "seed": ("uint64", ()),
}


def images_of(
    split: Split, model: ModelFacts, count: int, seed: int = 0, prompts: Prompts | None = None
) -> tuple[Conditions, list[int]]:
    """Return the conditions and the seeds of `count` images of a split.

    Classes and prompts come in turn. Without `prompts` a text model gets random ones, see
    `sg_runtime.conditions.examples`. Splits share no seeds, so their noise and kept tokens differ
    too. Splits share no classes and no prompts. An exception are fewer than four of them, where
    every split has all.
    """
    seeds = [_SEEDS[split] + seed + image for image in range(count)]
    if prompts is not None:
        return split_of(split, prompts, count).conditions(count), seeds
    if not isinstance(model.conditions, Labels):
        return examples(model, count, seeds[0]), seeds
    every = range(model.conditions.count)
    classes = [label for label in every if len(every) < 4 or label % 4 in _PLACES[split]]
    return of_classes(model.conditions, [classes[image % len(classes)] for image in range(count)]), seeds


def split_of(split: Split, prompts: Prompts, count: int) -> Prompts:
    """Return the prompts of `count` images of a split."""
    return prompts.of(_PLACES[split], count)


def collect(
    pipe: Pipeline,
    guidances: Sequence[GuidancePlan],
    settings: FeedSettings,
    folder: Path,
    identity: str,
    report: Callable[[str, int, int], None],
    prompts: Prompts | None = None,
) -> list[Path]:
    """Sample guided runs with the pipeline and write their states to `folder`; return the shards.

    Existing shards are kept, so an interrupted collection can be resumed. identity: identity of the
    model, see `identity_of`. report: callback with (stage, shards done, shards in total).
    prompts: see `images_of`.
    Raises CalibrationError if the folder holds altered shards, or shards of another model or of
    other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "identity": identity,
        "settings": asdict(settings),
        "guidances": [f"{_name(plan)} at {plan.scale}" for plan in guidances],
    }
    if prompts is not None:
        facts["prompts"] = list(prompts.texts)
    known: dict[str, str] = {}
    if (folder / SHARDS_FILE).exists():
        content = _manifest(folder)
        known = content.pop("shards")
        if content != facts:
            raise CalibrationError(
                f"{folder}: expected shards of this model with these settings, found others: give an empty folder"
            )
        _check_hashes(folder, known)
    conditions, seeds = images_of("calibration", pipe.bundle.manifest.model, settings.samples, settings.seed, prompts)
    size = min(pipe.batch, settings.samples)
    jobs = [(plan, first) for plan in guidances for first in range(0, settings.samples, size)]
    shards = []
    for number, (plan, first) in enumerate(jobs):
        name = f"{_name(plan)}-{first}.npz"
        shards.append(folder / name)
        if name not in known:
            report(f"collecting {name}", number, len(jobs))
            batch = slice(first, first + size)
            images = conditions.of(np.arange(settings.samples)[batch])
            _write(shards[-1], _run(pipe, plan, settings.steps, images, seeds[batch]))
            known[name] = sha256_of(shards[-1])
            with replacing(folder / SHARDS_FILE) as temporary:
                temporary.write_text(json.dumps({**facts, "shards": known}, indent=1) + "\n")
    return shards


def shard_folders(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[Path]:
    """Return the folder of each size's shards: one in `folder`, such as 512x768, for several."""
    return [folder / size_text(size) for size in sizes] if len(sizes) > 1 else [folder]


def given_shards(folder: Path) -> list[Path]:
    """Return the shards in a folder of the user.

    Raises CalibrationError if there are none. If `collect` made the folder, it also raises
    CalibrationError for a shard that was altered.
    """
    if not folder.is_dir():
        raise CalibrationError(f"{folder}: expected a folder of .npz files, found none")
    if (folder / SHARDS_FILE).exists():
        _check_hashes(folder, _manifest(folder)["shards"])
    shards = sorted(folder.glob("*.npz"))
    if not shards:
        raise CalibrationError(f"{folder}: expected .npz files with x, time and conditions, found none")
    return shards


def read_shard(path: Path, model: ModelFacts) -> Shard:
    """Read a shard. A shard made by a user may leave out seed, step and evaluation.

    Raises CalibrationError if the file is not a shard, or if an array does not match `Shard`.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as archive:
            found = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise CalibrationError(f"{path}: expected a NumPy archive, found something else ({error})") from None
    required, optional = _condition_types(model)
    types = {**required, **_TYPES, **optional}
    if missing := {"x", "time", *required} - found.keys():
        wanted = ", ".join(("x", "time", *required))
        raise CalibrationError(f"{path}: expected arrays {wanted}, found no {', '.join(sorted(missing))}")
    if unknown := found.keys() - types.keys():
        raise CalibrationError(f"{path}: expected only {', '.join(types)}, found also {', '.join(sorted(unknown))}")
    first = next(iter(required))
    evaluations, images = found["time"].size, len(found[first]) if found[first].ndim else 0
    defaults = {
        "step": np.arange(evaluations, dtype=np.int64),
        "evaluation": np.zeros(evaluations, np.int64),
        "seed": np.arange(images, dtype=np.uint64),
    }
    found = defaults | found
    latent = (evaluations, images, *model.latent)
    shapes: dict[str, tuple[int, ...]] = {"x": latent, "seed": (images,)}
    shapes |= {name: (images, *shape) for name, (_, shape) in {**required, **optional}.items()}
    for name in ("time", *required, *(name for name in types if name in found)):  # the first two fix the shapes
        dtype = types[name][0]
        array, shape = found[name], shapes.get(name, (evaluations,))
        if array.dtype != dtype or array.shape != shape:
            raise CalibrationError(f"{path}: {name}: expected {dtype} of {shape}, found {array.dtype} of {array.shape}")
    if not all(np.isfinite(found[name]).all() for name in ("x", "time")):
        raise CalibrationError(f"{path}: expected finite numbers, found NaN or infinity in x or time")
    return Shard(**{name: found[name] for name in _TYPES}, conditions=_conditions(path, model, found))


def _condition_types(model: ModelFacts) -> tuple[_Types, _Types]:
    """Return type and shape per image of a file's arrays of conditions: required, optional."""
    if isinstance(model.conditions, Labels):
        return {"label": ("int64", ())}, {}
    text = model.conditions
    both = {"embeddings": ("float32", (text.tokens, text.width)), "mask": ("int64", (text.tokens,))}
    return both, {f"negative_{name}": kind for name, kind in both.items()}


def _conditions(path: Path, model: ModelFacts, found: Mapping[str, Array]) -> Conditions:
    """Return the conditions in a file's arrays."""
    try:
        if isinstance(model.conditions, Labels):
            if found["label"].min(initial=0) < 0 or found["label"].max(initial=0) > model.conditions.count:
                raise UsageError(f"label: expected 0 to {model.conditions.count} (no class), found others")
            return of_classes(model.conditions, found["label"].tolist())
        negative = (found.get("negative_embeddings"), found.get("negative_mask"))
        return of_prompts(model, found["embeddings"], found["mask"], *negative)
    except UsageError as error:
        raise CalibrationError(f"{path}: {error}") from None


def _arrays(conditions: Conditions) -> dict[str, Array]:
    """Return conditions as the arrays of a file, see `Shard`."""
    own = conditions.rows(weak=False)
    if "class" in own:
        return {"label": own["class"]}
    negative = {} if conditions.weak is None else conditions.rows(weak=True)
    return own | {f"negative_{name}": values for name, values in negative.items()}


def _run(pipe: Pipeline, guidance: GuidancePlan, steps: int, conditions: Conditions, seeds: Sequence[int]) -> Shard:
    """Sample a guided Heun run and return the states along it."""
    manifest = pipe.bundle.manifest
    path = trajectory(replace(manifest.sampling, steps=steps, sampler="heun"), manifest.model.prediction)
    run = path.updates
    counters = [(update.step, update.evaluation) for update in run]
    plan = pipe.prepare([update.time for update in run], conditions, seeds, counters=counters, guidance=guidance)
    states: list[Array] = []

    def advance(index: int, x: Array, r: Array) -> Array:
        states.append(x)
        return run[index].next(x, pipe.guided(x, plan, index), r)

    integrate(run, advance, np.float32(path.start) * pipe.initial_noise(seeds))
    step, evaluation = np.array(counters, np.int64).T
    time = np.array([update.time for update in run])
    return Shard(np.stack(states), time, step, evaluation, np.array(seeds, np.uint64), conditions)


def _write(path: Path, shard: Shard) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream, allow_pickle=False, **{name: getattr(shard, name) for name in _TYPES}, **_arrays(shard.conditions)
        )


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / SHARDS_FILE).read_bytes())
        if not isinstance(content["shards"], dict):
            raise TypeError("shards")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CalibrationError(
            f"{folder / SHARDS_FILE}: expected the list of the shards, found something else: collect again in an empty "
            f"folder"
        ) from None
    return content


def _check_hashes(folder: Path, shards: Mapping[str, str]) -> None:
    for name, wanted in shards.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != wanted:
            found = "an altered one" if path.is_file() else "none"
            raise CalibrationError(
                f"{path}: expected the shard that was collected, found {found}: collect again in an empty folder"
            )


def _name(plan: GuidancePlan) -> str:
    """Return the part of a shard's file name that identifies its guidance, such as sg-256-128."""
    return f"{plan.mode}-{plan.strong.keep}-{plan.weak.keep}"


def identity_of(manifest: Manifest) -> str:
    """Return a SHA-256 of everything that the ranges depend on.

    It covers the checkpoints, which of their weights are used, the route, the prediction type and
    the number of heads.
    """
    sources = [(s.sha256, s.weights) for s in (manifest.source, manifest.weak_source) if s is not None]
    facts = [sources, str(manifest.model.route), manifest.model.prediction, manifest.model.heads]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
