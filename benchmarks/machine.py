"""Describe the machine and the libraries of a measurement."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine(*libraries: str) -> dict[str, object]:
    """Return processor, usable cores, system, and the versions of Python and `libraries`."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
