"""Facts about this process."""

import math
import os
import resource
from pathlib import Path, PurePosixPath


def peak_memory() -> int:
    """Return the peak resident set size of this process in bytes.

    Linux is read from /proc: its `getrusage` also counts the program that started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use.

    It is the number of cores of its affinity, or the CPU quota of its cgroups, rounded up, if that
    is less.
    root: folder in place of the root of the file system, for tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Return the CPU quotas, in cores, of the process's cgroups and of their parents."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for part in (place := PurePosixPath(group), *place.parents):  # a container may see only "/"
            inside = part.as_posix().lstrip("/")
            if controllers:
                folder = root / "sys/fs/cgroup/cpu" / inside
                words = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
            else:
                words = " ".join(_lines(root / "sys/fs/cgroup" / inside / "cpu.max")).split()
            if len(words) == 2 and words[0] not in ("max", "-1"):
                found.append(int(words[0]) / int(words[1]))
    return found


def _lines(path: Path) -> list[str]:
    """Return the lines of a file, none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
