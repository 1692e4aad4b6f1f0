"""`sg-export sample --ray`: workers, nodes and commands that are killed, and what stays."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from job_folders import LOOPBACK, alive, content, descendants, listening, name_of, processor_seconds, running, wait_for

from sg_export.cli import main

pytestmark = pytest.mark.slow

LONG = ("--count", 40, "--shard", 2, "--batch", 2, "--steps", 1500, "--threads", 1, "--format", "webdataset")
CLUSTER = Path(__file__).parents[2] / "sg_runtime/fixtures/ray_cluster.py"


@pytest.fixture(scope="session")
def long_job(picture_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of the job `LONG`, sampled in this process."""
    pytest.importorskip("ray", reason="needs the extra ray")
    folder = tmp_path_factory.mktemp("long") / "out"
    words = [str(word) for word in ("sample", picture_bundle, *LONG, "-o", folder)]
    assert CliRunner().invoke(main, words).exit_code == 0
    return content(folder)


def workers_at_work(ancestor: int) -> list[int]:
    """Wait until each of two workers is in the middle of a shard, and return their numbers."""
    workers: list[int] = []

    def found() -> bool:
        workers[:] = [one for one in descendants(ancestor) if "MapWorker" in name_of(one)]
        return len(workers) == 2

    wait_for(found)
    before = [processor_seconds(worker) for worker in workers]
    wait_for(lambda: all(processor_seconds(one) > used + 0.1 for one, used in zip(workers, before, strict=True)))
    return workers


def test_sample_by_ray_on_this_machine_survives_its_workers_and_leaves_no_process(
    start: Callable[..., Any], picture_bundle: Path, long_job: dict[str, bytes], tmp_path: Path
) -> None:
    """All workers are killed in the middle. All servers listen to this machine alone."""
    out = tmp_path / "out"
    with running(start, "sample", picture_bundle, *LONG, "-o", out, "--ray") as process:
        wait_for(lambda: len(list(out.glob("*.tar"))) >= 2)
        started = descendants(process.pid)
        assert listening(started) == listening(started) & LOOPBACK != set()
        for worker in workers_at_work(process.pid):
            os.kill(worker, signal.SIGKILL)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 0, lines
    assert any("was lost with its worker: it is sampled again" in line for line in lines), lines
    assert content(out) == long_job
    wait_for(lambda: not any(map(alive, started)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_sample_by_ray_that_is_ended_leaves_no_process_and_goes_on(
    number: int,
    code: int,
    start: Callable[..., Any],
    picture_bundle: Path,
    long_job: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """It goes on without Ray to the same bytes.

    If the command is killed, agents of Ray that sample nothing end by themselves after a minute.
    """
    out = tmp_path / "out"
    with running(start, "sample", picture_bundle, *LONG, "-o", out, "--ray") as process:
        wait_for(lambda: len(list(out.glob("*.tar"))) >= 2)
        started = descendants(process.pid)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code, rest
    started = [one for one in started if code != -9 or "Agent" not in name_of(one)]
    wait_for(lambda: not any(map(alive, started)))
    assert content(out) != long_job
    words = [str(word) for word in ("sample", picture_bundle, *LONG, "-o", out)]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert content(out) == long_job


def test_sample_on_two_nodes_of_which_one_is_killed_loses_and_doubles_nothing(
    start: Callable[..., Any],
    environment: dict[str, str],
    picture_bundle: Path,
    long_job: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(CLUSTER)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            address = cluster.stdout.readline().strip()
            with running(start, "sample", picture_bundle, *LONG, "-o", out, "--ray", address) as process:
                wait_for(lambda: len(list(out.glob("*.tar"))) >= 3)
                workers_at_work(cluster.pid)
                cluster.stdin.write("kill\n")
                cluster.stdin.flush()
                assert cluster.stdout.readline() == "killed\n"
                lines = process.stderr.read().splitlines()
            assert process.returncode == 0, lines
            assert any("of the Ray cluster was lost" in line for line in lines), lines
            assert content(out) == long_job
        finally:
            cluster.stdin.close()
            cluster.wait(60)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "expected a cluster at 127.0.0.1:9, found none that answers ("),
        ("nonsense", "expected a cluster at nonsense, found none that answers ("),
    ],
)
def test_sample_at_an_address_without_a_cluster_ends_with_6(
    address: str, message: str, process: Callable[..., Any], picture_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    result = process("sample", picture_bundle, *LONG, "-o", "out", "--ray", address)
    assert result.returncode == 6, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.endswith("start one with ray start, on this machine too, or leave the address out\n")
    assert not (tmp_path / "out").exists()


def test_sample_by_ray_without_the_extra_ends_with_2(
    process: Callable[..., Any], picture_bundle: Path, tmp_path: Path
) -> None:
    result = process("sample", picture_bundle, *LONG, "-o", "out", "--ray", blocked=("ray",))
    assert result.returncode == 2, result.stderr
    assert result.stderr == "Error: ray is not installed: pip install -e '.[ray]' in a checkout of sg-export\n"
