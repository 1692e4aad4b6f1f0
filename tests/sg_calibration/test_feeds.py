"""Shards of guided runs: their content, and the continuation of an interrupted collection."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sg_calibration import feeds
from sg_calibration.feeds import SHARDS_FILE, collect, given_shards, identity_of, images_of, read_shard
from sg_calibration.settings import LEAST_STRATA, FeedSettings
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CalibrationError, UsageError
from sg_runtime.guidance import built_guidances
from sg_runtime.manifest import ModelFacts
from sg_runtime.pipeline import Pipeline

SETTINGS = FeedSettings(samples=3)
Collect = Callable[..., list[Path]]


@pytest.fixture
def facts(reference: Bundle) -> ModelFacts:
    return reference.manifest.model


@pytest.fixture(scope="session")
def collected(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Shards of three images for each pair, two images per run."""
    pair = Pipeline(pipe.bundle, pipe.backend, 2)
    identity, plans = identity_of(pipe.bundle.manifest), built_guidances(pipe.bundle.manifest)
    return collect(pair, plans, SETTINGS, tmp_path_factory.mktemp("feeds"), identity, lambda *_: None)


@pytest.fixture
def again(pipe: Pipeline) -> Collect:
    """Return a function that collects the same shards into a folder, except for given changes."""

    def run(folder: Path, settings: FeedSettings = SETTINGS, report: Any = lambda *_: None, **changes: Any) -> Any:
        pair = Pipeline(pipe.bundle, pipe.backend, 2)
        plans = changes.get("plans", built_guidances(pipe.bundle.manifest))
        return collect(
            pair, plans, settings, folder, changes.get("identity", identity_of(pipe.bundle.manifest)), report
        )

    return run


def test_feed_settings_with_too_little_are_refused() -> None:
    with pytest.raises(UsageError, match="`samples`: expected at least 1, found 0"):
        FeedSettings(samples=0)
    with pytest.raises(UsageError, match="`steps`: expected at least 25, found 24"):
        FeedSettings(steps=24)
    with pytest.raises(UsageError, match=r"`seed`: expected 0 to \d+, found 1099511627776"):
        FeedSettings(seed=1 << 40)


def test_collect_has_both_heun_evaluations_of_all_strata_for_every_pair(
    collected: list[Path], facts: ModelFacts
) -> None:
    assert [path.name for path in collected] == [f"sg-{s}-8-{first}.npz" for s in (16, 12) for first in (0, 2)]
    for path in collected:
        shard = read_shard(path, facts)
        first = shard.evaluation == 0
        assert first.sum() == len(set(shard.time[first])) == LEAST_STRATA
        # Every step except the last has a second evaluation, at the time of the next step.
        np.testing.assert_array_equal(shard.time[~first], shard.time[first][1:])
        np.testing.assert_array_equal(shard.step[~first], np.arange(LEAST_STRATA - 1))
    wanted = images_of("calibration", facts, 3)
    for k in (0, 2):
        pair = [read_shard(path, facts) for path in collected[k : k + 2]]
        found = np.concatenate([shard.conditions.rows(weak=False)["class"] for shard in pair])
        np.testing.assert_array_equal(found, wanted[0].rows(weak=False)["class"])
        assert [int(seed) for shard in pair for seed in shard.seed] == wanted[1]


def test_collect_has_the_states_of_a_run(collected: list[Path], pipe: Pipeline, facts: ModelFacts) -> None:
    shard, plan = read_shard(collected[0], facts), built_guidances(pipe.bundle.manifest)[0]
    np.testing.assert_array_equal(shard.x[0], pipe.initial_noise(shard.seed.tolist()))
    # The next state computed by hand: x - dt * (v0 + v1) / 2, in float32.
    prepared = pipe.prepare(shard.time, shard.conditions, shard.seed.tolist(), counters=shard.counters, guidance=plan)
    step = shard.time[0] - shard.time[1]
    slopes = [pipe.guided(shard.x[k], prepared, k) for k in range(2)]
    np.testing.assert_allclose(shard.x[1], shard.x[0] - step * slopes[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shard.x[2], shard.x[0] - step * (slopes[0] + slopes[1]) / 2, rtol=1e-4, atol=1e-5)


def test_collect_is_deterministic(collected: list[Path], again: Collect, tmp_path: Path, facts: ModelFacts) -> None:
    for path, other in zip(collected, again(tmp_path / "again"), strict=True):
        a, b = read_shard(path, facts), read_shard(other, facts)
        np.testing.assert_array_equal(a.x, b.x)


@pytest.mark.parametrize("count", [8, 12])
def test_images_of_splits_share_no_class_and_no_seed(count: int, facts: ModelFacts) -> None:
    found = [images_of(split, facts, count) for split in ("calibration", "search", "gate")]
    labels = [conditions.rows(weak=False)["class"].tolist() for conditions, _ in found]
    classes, seeds = [set(part) for part in labels], [set(part) for _, part in found]
    assert sum(map(len, classes)) == len(set.union(*classes))
    assert sum(map(len, seeds)) == 3 * count == len(set.union(*seeds))
    counts = np.bincount(labels[0])
    assert np.ptp(counts[counts > 0]) <= 1, "classes are taken in turn"
    assert images_of("calibration", facts, 2, seed=5)[1] == [5, 6]


def test_collect_after_a_shard_is_gone_makes_that_alone(again: Collect, tmp_path: Path) -> None:
    paths = again(tmp_path)
    content = [path.read_bytes() for path in paths]
    listed = json.loads((tmp_path / SHARDS_FILE).read_text())
    del listed["shards"][paths[1].name]
    (tmp_path / SHARDS_FILE).write_text(json.dumps(listed))
    paths[1].unlink()
    told: list[str] = []
    assert again(tmp_path, report=lambda stage, *_: told.append(stage)) == paths
    assert told == [f"collecting {paths[1].name}"]
    assert [path.read_bytes() for path in paths] == content


def test_collect_that_was_interrupted_goes_on(again: Collect, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def report(_: str, done: int, total: int) -> None:
        told.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(tmp_path, report=report)
    assert again(tmp_path, report=lambda _, done, total: told.append((done, total)))[-1].is_file()
    assert told == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4)]


def test_collect_on_a_full_disk_leaves_what_can_go_on(
    again: Collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the third shard on."""
    written, savez = [], np.savez

    def full(stream: Any, **arrays: Any) -> None:
        written.append(stream)
        if len(written) == 3:
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(stream, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(feeds.np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            again(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sg-16-8-0.npz", "sg-16-8-2.npz", SHARDS_FILE}
    told: list[str] = []
    again(tmp_path, report=lambda stage, *_: told.append(stage))
    assert told == ["collecting sg-12-8-0.npz", "collecting sg-12-8-2.npz"]


def test_collect_into_shards_of_something_else_is_refused(again: Collect, tmp_path: Path, pipe: Pipeline) -> None:
    plan = built_guidances(pipe.bundle.manifest)[0]
    again(tmp_path, plans=[plan])
    for changes in (
        {"settings": FeedSettings(samples=4), "plans": [plan]},
        {"settings": FeedSettings(samples=3, seed=1), "plans": [plan]},
        {"identity": "0" * 64, "plans": [plan]},
        {},
    ):
        with pytest.raises(CalibrationError, match="expected shards of this model with these settings, found others"):
            again(tmp_path, **changes)


def test_collect_into_shards_of_another_scale_is_refused(again: Collect, tmp_path: Path, pipe: Pipeline) -> None:
    plan = built_guidances(pipe.bundle.manifest)[0]
    again(tmp_path, plans=[plan])
    other = type(plan)(plan.mode, plan.strong, plan.weak, plan.scale + 1)
    with pytest.raises(CalibrationError, match="expected shards of this model with these settings, found others"):
        again(tmp_path, plans=[other])


def test_collect_and_given_shards_refuse_altered_ones(again: Collect, tmp_path: Path) -> None:
    paths = again(tmp_path)
    assert given_shards(tmp_path) == sorted(paths)
    paths[0].write_bytes(paths[1].read_bytes())
    for read in (again, given_shards):
        with pytest.raises(CalibrationError, match=f"{paths[0].name}: expected the shard .* an altered one: collect"):
            read(tmp_path)
    paths[0].unlink()
    with pytest.raises(CalibrationError, match="found none: collect again"):
        again(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shards": 1}', '{"shards": []}', "[" * 100_000, "\x00"])
def test_collect_with_a_damaged_list_is_refused(text: str, again: Collect, tmp_path: Path) -> None:
    (tmp_path / SHARDS_FILE).write_text(text)
    with pytest.raises(CalibrationError, match="expected the list of the shards, found something else: collect again"):
        again(tmp_path)


def test_given_shards_of_no_folder_or_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"expected a folder of .npz files, found none"):
        given_shards(tmp_path / "missing")
    with pytest.raises(CalibrationError, match=r"expected .npz files with x, time and conditions, found none"):
        given_shards(tmp_path)


def arrays(**changes: Any) -> dict[str, Any]:
    """Return a user's shard for the tiny model: two evaluations of three images.

    The last image has no class.
    """
    usual = {"x": np.zeros((2, 3, 2, 8, 8), np.float32), "time": np.array([1.0, 0.5]), "label": np.array([0, 4, 5])}
    return {name: array for name, array in {**usual, **changes}.items() if array is not None}


def test_read_shard_without_seeds_and_counters_has_them(tmp_path: Path, facts: ModelFacts) -> None:
    np.savez(tmp_path / "own.npz", **arrays())
    shard = read_shard(tmp_path / "own.npz", facts)
    assert shard.conditions.rows(weak=False)["class"].tolist() == [0, 4, 5]
    assert shard.counters == [(0, 0), (1, 0)]
    assert shard.seed.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "expected arrays x, time, label, found no x"),
        ({"noise": np.zeros(1)}, "found also noise"),
        ({"x": np.zeros((2, 3, 2, 8, 8))}, r"x: expected float32 of \(2, 3, 2, 8, 8\), found float64"),
        ({"x": np.zeros((2, 2, 2, 8, 8), np.float32)}, r"x: expected .* found float32 of \(2, 2, 2, 8, 8\)"),
        ({"x": np.full((2, 3, 2, 8, 8), np.nan, np.float32)}, "expected finite numbers, found NaN"),
        ({"time": np.array([1, 0])}, "time: expected float64"),
        ({"time": np.array([1.0, np.inf])}, "expected finite numbers, found NaN or infinity in x or time"),
        ({"time": np.float64(1.0)}, r"time: expected"),
        ({"label": np.array([0, 1, 6])}, r"label: expected 0 to 5 \(no class\), found others"),
        ({"label": np.array([0, 1, -1])}, r"label: expected 0 to 5 \(no class\), found others"),
        ({"label": np.array([0.0, 1, 2])}, "label: expected int64"),
        ({"seed": np.array([0, 1, 2])}, "seed: expected uint64"),
        ({"step": np.array([0])}, "step: expected int64"),
        ({"evaluation": np.array([0, 1], np.int32)}, "evaluation: expected int64"),
        ({"x": np.array([None])}, "expected a NumPy archive"),
    ],
    ids=str,
)
def test_read_shard_with_a_fault_names_it(
    changes: dict[str, Any], message: str, tmp_path: Path, facts: ModelFacts
) -> None:
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(CalibrationError, match=f"own.npz: .*{message}|own.npz: {message}"):
        read_shard(tmp_path / "own.npz", facts)


@pytest.mark.parametrize("content", ["damaged", "text", "empty", "half a shard", "one array"])
def test_read_shard_of_another_file_is_refused(
    content: str, tmp_path: Path, facts: ModelFacts, collected: list[Path]
) -> None:
    path = tmp_path / "own.npz"
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    np.savez_compressed(tmp_path / "packed.npz", **arrays())
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[60:70] = b"\xff" * 10
    files = {"damaged": bytes(packed), "text": b"text", "empty": b"", "half a shard": collected[0].read_bytes()[:1000]}
    path.write_bytes(files.get(content, path.read_bytes()))
    with pytest.raises(CalibrationError, match="expected a NumPy archive, found something else"):
        read_shard(path, facts)
