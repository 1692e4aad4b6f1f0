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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sg_calibration.settings import SEEDS, FeedSettings
from sg_runtime.errors import CalibrationError
from sg_runtime.files import replacing, sha256_of
from sg_runtime.manifest import GuidancePlan, Manifest, ModelFacts
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
    label: class of each image, (B,) int64; `num_classes` is "no class".
    seed: seed of each image, (B,) uint64.
    """

    x: Array
    time: Array
    step: Array
    evaluation: Array
    label: Array
    seed: Array

    def classes(self, model: ModelFacts) -> list[int | None]:
        """Return the labels in the form that a pipeline takes: None is "no class"."""
        return [None if label == model.num_classes else int(label) for label in self.label]

    @property
    def counters(self) -> list[tuple[int, int]]:
        """Pair (step, evaluation) of each evaluation."""
        return [(int(step), int(number)) for step, number in zip(self.step, self.evaluation, strict=True)]


_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Exceptions that NumPy raises for a file that is not an archive of arrays."""

_TYPES = {"x": "float32", "time": "float64", "step": "int64", "evaluation": "int64", "label": "int64", "seed": "uint64"}


def images_of(split: Split, model: ModelFacts, count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the classes (round-robin) and the seeds of `count` images of a split.

    Splits share no seeds, so their noise and kept tokens differ too. Splits share no classes. An
    exception is a model with fewer than four classes, where every split has all of them.
    """
    classes = [label for label in range(model.num_classes) if model.num_classes < 4 or label % 4 in _PLACES[split]]
    return [classes[image % len(classes)] for image in range(count)], [
        _SEEDS[split] + seed + image for image in range(count)
    ]


def collect(
    pipe: Pipeline,
    guidances: Sequence[GuidancePlan],
    settings: FeedSettings,
    folder: Path,
    identity: str,
    report: Callable[[str, int, int], None],
) -> list[Path]:
    """Sample guided runs with the pipeline and write their states to `folder`; return the shards.

    Existing shards are kept, so an interrupted collection can be resumed. identity: identity of the
    model, see `identity_of`. report: callback with (stage, shards done, shards in total).
    Raises CalibrationError if the folder holds altered shards, or shards of another model or of
    other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "identity": identity,
        "settings": asdict(settings),
        "guidances": [f"{_name(plan)} at {plan.scale}" for plan in guidances],
    }
    known: dict[str, str] = {}
    if (folder / SHARDS_FILE).exists():
        content = _manifest(folder)
        known = content.pop("shards")
        if content != facts:
            raise CalibrationError(
                f"{folder}: expected shards of this model with these settings, found others: give an empty folder"
            )
        _check_hashes(folder, known)
    classes, seeds = images_of("calibration", pipe.bundle.manifest.model, settings.samples, settings.seed)
    size = min(pipe.batch, settings.samples)
    jobs = [(plan, first) for plan in guidances for first in range(0, settings.samples, size)]
    shards = []
    for number, (plan, first) in enumerate(jobs):
        name = f"{_name(plan)}-{first}.npz"
        shards.append(folder / name)
        if name not in known:
            report(f"collecting {name}", number, len(jobs))
            batch = slice(first, first + size)
            _write(shards[-1], _run(pipe, plan, settings.steps, classes[batch], seeds[batch]))
            known[name] = sha256_of(shards[-1])
            with replacing(folder / SHARDS_FILE) as temporary:
                temporary.write_text(json.dumps({**facts, "shards": known}, indent=1) + "\n")
    return shards


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
        raise CalibrationError(f"{folder}: expected .npz files with x, time and label, found none")
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
    if missing := {"x", "time", "label"} - found.keys():
        raise CalibrationError(f"{path}: expected arrays x, time and label, found no {', '.join(sorted(missing))}")
    if unknown := found.keys() - _TYPES.keys():
        raise CalibrationError(f"{path}: expected only {', '.join(_TYPES)}, found also {', '.join(sorted(unknown))}")
    evaluations, images = found["time"].size, found["label"].size
    defaults = {
        "step": np.arange(evaluations, dtype=np.int64),
        "evaluation": np.zeros(evaluations, np.int64),
        "seed": np.arange(images, dtype=np.uint64),
    }
    found = defaults | found
    latent = (evaluations, images, *model.latent)
    shapes = {"x": latent, "label": (images,), "seed": (images,)}
    for name in ("time", "label", *_TYPES):  # time and label come first: their lengths fix the shapes of the others
        dtype = _TYPES[name]
        array, shape = found[name], shapes.get(name, (evaluations,))
        if array.dtype != dtype or array.shape != shape:
            raise CalibrationError(f"{path}: {name}: expected {dtype} of {shape}, found {array.dtype} of {array.shape}")
    if not all(np.isfinite(found[name]).all() for name in ("x", "time")):
        raise CalibrationError(f"{path}: expected finite numbers, found NaN or infinity in x or time")
    if found["label"].min(initial=0) < 0 or found["label"].max(initial=0) > model.num_classes:
        raise CalibrationError(f"{path}: label: expected 0 to {model.num_classes} (no class), found others")
    return Shard(**{field.name: found[field.name] for field in fields(Shard)})


def _run(pipe: Pipeline, guidance: GuidancePlan, steps: int, classes: Sequence[int], seeds: Sequence[int]) -> Shard:
    """Sample a guided Heun run and return the states along it."""
    manifest = pipe.bundle.manifest
    path = trajectory(replace(manifest.sampling, steps=steps, sampler="heun"), manifest.model.prediction)
    run = path.updates
    counters = [(update.step, update.evaluation) for update in run]
    plan = pipe.prepare([update.time for update in run], classes, seeds, counters=counters, guidance=guidance)
    states: list[Array] = []

    def advance(index: int, x: Array, r: Array) -> Array:
        states.append(x)
        return run[index].next(x, pipe.guided(x, plan, index), r)

    integrate(run, advance, np.float32(path.start) * pipe.initial_noise(seeds))
    step, evaluation = np.array(counters, np.int64).T
    time = np.array([update.time for update in run])
    return Shard(np.stack(states), time, step, evaluation, np.array(classes, np.int64), np.array(seeds, np.uint64))


def _write(path: Path, shard: Shard) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **{field.name: getattr(shard, field.name) for field in fields(Shard)})


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
