"""Facts of this process."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

import sg_runtime.host


def test_peak_memory_is_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reports the peak in a file; other systems report it by `getrusage`.

    On Linux `getrusage` may include the parent process.
    """
    peak = sg_runtime.host.peak_memory()
    assert 50e6 < peak < 20e9
    monkeypatch.setattr(sg_runtime.host, "Path", lambda name: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(sg_runtime.host.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=123))
    assert sg_runtime.host.peak_memory() == 123


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "5:cpuset:/\n3:cpu,cpuacct:/docker/1f\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_usable_cores_are_those_of_affinity_and_quota(
    files: Mapping[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sg_runtime.host.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert sg_runtime.host.usable_cores(tmp_path) == expected
