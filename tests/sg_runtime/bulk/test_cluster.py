"""What a job by Ray refuses, on a real cluster of one core in this process."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from sg_runtime.bulk import Request, cluster, run_job
from sg_runtime.errors import DeviceError, UsageError
from sg_runtime.ray_host import Need, connect, keep_ray_private

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Return Ray, connected to a cluster of one core."""
    with patch.dict(os.environ):
        keep_ray_private(True)
        module = pytest.importorskip("ray", reason="needs the extra ray")
        connect(module, "", num_cpus=1, include_dashboard=False)
        yield module
        module.shutdown()


@pytest.fixture
def watch(ray: Any) -> Iterator[Callable[[Need], Any]]:
    """Return a function that watches the cluster for a job whose workers need so much."""
    ledger = ray.remote(num_cpus=0)(cluster._Ledger).remote()
    yield lambda need: cluster._Watch(ray, need, ledger)
    ray.kill(ledger)


def begin(ray: Any, watched: Any, shard: int, times: int) -> None:
    """Begin a shard so many times, as workers do."""
    ray.get([watched._ledger.begin.remote(shard) for _ in range(times)])


def test_job_without_a_node_for_its_workers_waits_and_ends(
    watch: Callable[[Need], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch(Need(2, 0))
    watched.look()
    monkeypatch.setattr(cluster, "PATIENCE", 0.0)
    with pytest.raises(DeviceError, match="Ray: expected a node with 2 CPUs, found none for 0 s: the complete shards"):
        watched.look()
    watch(Need(1, 0)).look()


def test_shard_that_is_lost_is_told_once_and_one_that_is_lost_again_and_again_ends_the_job(
    ray: Any, watch: Callable[[Need], Any], caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(Need(1, 0))
    begin(ray, watched, 3, 1)
    watched.look()
    assert caplog.messages == []
    begin(ray, watched, 3, 1)
    with caplog.at_level(logging.WARNING):
        watched.look()
        watched.look()
    assert caplog.messages == ["shard 3 was lost with its worker: it is sampled again"]
    begin(ray, watched, 3, cluster.TRIES - 1)
    with pytest.raises(
        DeviceError, match="Ray: shard 3: expected a worker that completes it, found 8 that ended: give"
    ):
        watched.look()


def test_job_waits_for_a_worker_that_is_free_and_says_so(
    ray: Any,
    request_of: Callable[..., Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The only core is taken until the warning comes."""
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    released = tmp_path / "released"

    def hold(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.05)

    holding = ray.remote(num_cpus=1)(hold).remote(str(released))
    told = "waiting for a worker with 1 CPU in the Ray cluster that is free"

    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == told:
                released.touch()

    cluster.LOG.addHandler(release := Release())
    try:
        done = run_job(request_of(), tmp_path / "out", cluster="")
    finally:
        cluster.LOG.removeHandler(release)
    ray.get(holding)
    assert done.images == 10
    assert told in caplog.messages


def test_error_of_a_worker_is_that_of_a_run_without_ray_and_one_of_ray_says_its_cause(
    ray: Any, request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: object) -> None:
        raise ValueError("of the pipeline")

    monkeypatch.setattr(cluster, "_planned", wrong)
    with pytest.raises(DeviceError, match=r"expected workers that sample, found an error of Ray \(of the pipeline"):
        run_job(request_of(), tmp_path / "ray", cluster="")
    monkeypatch.setattr(cluster, "_planned", lambda request: cluster._caught(wrong))
    with pytest.raises(ValueError, match="of the pipeline"):
        run_job(request_of(), tmp_path / "caught", cluster="")


def test_address_in_a_process_that_is_connected_is_refused(
    ray: Any, request_of: Callable[..., Request], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cluster there:1: expected no address, since this process is connected"):
        run_job(request_of(), tmp_path / "out", cluster="there:1")


@pytest.mark.parametrize(
    ("changes", "limit", "message"),
    [
        ({}, 3 * 8 * 8 * 3, "shard: expected at most 3 images of this size with `ray`, found 4"),
        ({"threads": 2}, cluster.SHARD_LIMIT, "expected a node of the Ray cluster with 2 CPUs for a worker, found at"),
    ],
)
def test_job_that_does_not_fit_the_cluster_is_refused_before_it_begins(
    ray: Any,
    request_of: Callable[..., Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    limit: int,
    message: str,
) -> None:
    monkeypatch.setattr(cluster, "SHARD_LIMIT", limit)
    with pytest.raises(UsageError, match=message):
        run_job(request_of(**changes), tmp_path / "out", cluster="")
    assert not (tmp_path / "out").exists()
