"""States of real guided runs, on disk: what ranges are measured on.

A folder of shards, each a NumPy archive with one batch of images along one guided run, and a manifest that says what
they are of. Token subsets are not stored: seed, step and evaluation draw them again (`sg_runtime.philox`).
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sg_calibration.settings import SEEDS, FeedSettings
from sg_runtime.errors import CalibrationError
from sg_runtime.files import replacing, sha256_of
from sg_runtime.manifest import GuidancePlan, ModelFacts
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import integrate, run_times, updates

Array = NDArray[Any]
Split = Literal["calibration", "search", "gate"]

SHARDS_FILE = "feeds.json"
_PLACES: Mapping[Split, tuple[int, ...]] = {"calibration": (0, 1), "search": (2,), "gate": (3,)}
_SEEDS: Mapping[Split, int] = {"calibration": 0, "search": SEEDS, "gate": 2 * SEEDS}


@dataclass(frozen=True, slots=True)
class Shard:
    """A batch of images along a run of E evaluations.

    x: (E, B, C, H, W) float32, the state at each. time: (E,) float64, t or sigma. step, evaluation: (E,) int64, for
    the random subsets. label: (B,) int64, `num_classes` is "no class". seed: (B,) uint64.
    """

    x: Array
    time: Array
    step: Array
    evaluation: Array
    label: Array
    seed: Array

    def classes(self, model: ModelFacts) -> list[int | None]:
        """The labels as a pipeline takes them."""
        return [None if label == model.num_classes else int(label) for label in self.label]

    @property
    def counters(self) -> list[tuple[int, int]]:
        """(step, evaluation) of each evaluation."""
        return [(int(step), int(number)) for step, number in zip(self.step, self.evaluation, strict=True)]


_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy raises for a file that is no archive of arrays."""

_TYPES = {"x": "float32", "time": "float64", "step": "int64", "evaluation": "int64", "label": "int64", "seed": "uint64"}


def images_of(split: Split, model: ModelFacts, count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Classes, in turn, and seeds of `count` images.

    Of other splits neither is the same, nor are therefore noise and subsets; with fewer than four classes all splits
    have all of them.
    """
    own = [label for label in range(model.num_classes) if model.num_classes < 4 or label % 4 in _PLACES[split]]
    return [own[image % len(own)] for image in range(count)], [_SEEDS[split] + seed + image for image in range(count)]


def collect(
    pipe: Pipeline,
    guidances: Sequence[GuidancePlan],
    settings: FeedSettings,
    folder: Path,
    identity: str,
    report: Callable[[str, int, int], None],
) -> list[Path]:
    """Sample guided runs with the pipeline and write their states to `folder`; returns the shards.

    Shards that are there already stay, so that an interrupted collection goes on. identity: of the model, see
    `ranges.identity_of`. report: (stage, shards done, shards in all). Raises CalibrationError where the folder holds
    shards of another model or other settings, or altered ones.
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
            own = slice(first, first + size)
            _write(shards[-1], _run(pipe, plan, settings.steps, classes[own], seeds[own]))
            known[name] = sha256_of(shards[-1])
            with replacing(folder / SHARDS_FILE) as temporary:
                temporary.write_text(json.dumps({**facts, "shards": known}, indent=1) + "\n")
    return shards


def given_shards(folder: Path) -> list[Path]:
    """The shards in a user's folder. Raises CalibrationError where there are none, or altered ones of `collect`."""
    if not folder.is_dir():
        raise CalibrationError(f"{folder}: expected a folder of .npz files, found none")
    if (folder / SHARDS_FILE).exists():
        _check_hashes(folder, _manifest(folder)["shards"])
    shards = sorted(folder.glob("*.npz"))
    if not shards:
        raise CalibrationError(f"{folder}: expected .npz files with x, time and label, found none")
    return shards


def read_shard(path: Path, model: ModelFacts) -> Shard:
    """A shard; one that a user made may leave out seed, step and evaluation.

    Raises CalibrationError for a file that is none, or arrays that are not as `Shard` says.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as archive:
            found = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise CalibrationError(f"{path}: expected a NumPy archive, found something else ({error})") from None
    if missing := {"x", "time", "label"} - found.keys():
        raise CalibrationError(f"{path}: expected arrays x, time and label, found no {', '.join(sorted(missing))}")
    if unknown := found.keys() - _TYPES.keys():
        raise CalibrationError(f"{path}: expected {', '.join(_TYPES)}, found {', '.join(sorted(unknown))}, too")
    evaluations, images = found["time"].size, found["label"].size
    defaults = {
        "step": np.arange(evaluations, dtype=np.int64),
        "evaluation": np.zeros(evaluations, np.int64),
        "seed": np.arange(images, dtype=np.uint64),
    }
    found = defaults | found
    latent = (evaluations, images, *model.latent)
    shapes = {"x": latent, "label": (images,), "seed": (images,)}
    for name in ("time", "label", *_TYPES):  # the first two say how long the others are
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
    """A guided Heun run and its states."""
    manifest = pipe.bundle.manifest
    times = run_times(steps, manifest.sampling.karras)
    run = updates("heun", manifest.model.prediction, times)
    counters = [(update.step, update.evaluation) for update in run]
    plan = pipe.prepare([update.time for update in run], classes, seeds, counters=counters, guidance=guidance)
    states: list[Array] = []

    def advance(index: int, x: Array, r: Array) -> Array:
        states.append(x)
        return run[index].next(x, pipe.guided(x, plan, index), r)

    integrate(run, advance, np.float32(times[0]) * pipe.initial_noise(seeds))
    step, evaluation = np.array(counters, np.int64).T
    time = np.array([update.time for update in run])
    return Shard(np.stack(states), time, step, evaluation, np.array(classes, np.int64), np.array(seeds, np.uint64))


def _write(path: Path, shard: Shard) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **{field.name: getattr(shard, field.name) for field in fields(Shard)})


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / SHARDS_FILE).read_text())
        if not isinstance(content["shards"], dict):
            raise TypeError("shards")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CalibrationError(
            f"{folder / SHARDS_FILE}: expected the list of the shards, found something else: collect anew"
        ) from None
    return content


def _check_hashes(folder: Path, shards: Mapping[str, str]) -> None:
    for name, wanted in shards.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != wanted:
            found = "an altered one" if path.is_file() else "none"
            raise CalibrationError(f"{path}: expected the shard that was collected, found {found}: collect anew")


def _name(plan: GuidancePlan) -> str:
    """A guidance in a file's name, as sg-256-128."""
    return f"{plan.mode}-{plan.strong.keep}-{plan.weak.keep}"
