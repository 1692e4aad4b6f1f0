"""Invented machines and results of the check on a GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.gpu.machine import Found
from benchmarks.gpu.parts import EXPORT, VERIFY
from benchmarks.gpu.results import Figure, Finding, Machine, Result

VERSIONS = {"torch": "2.11.0+cu130", "onnxruntime": "1.31.1", **dict.fromkeys((*EXPORT, *VERIFY), "1.0")}


@pytest.fixture
def found() -> Found:
    """Return a machine that has all that the parts need, except for the bundles of DiT-XL/2."""
    return Found("A Card 80GB", "580.1", "13.0", ("CUDAExecutionProvider",), VERSIONS, {})


@pytest.fixture
def machine(found: Found) -> Machine:
    return Machine(found.card, found.driver, found.measured, "abc1234", "5e" * 32)


@pytest.fixture
def result(machine: Machine) -> Callable[..., Result]:
    """Return a function that makes a result of a part with changed fields."""
    findings = (
        Finding("batch 1", True, "", (Figure.of("step", "ms", 1.0, 2.0, 4.0),), ("a kernel: 3 times",), "timed"),
        Finding("batch 4", None, "", (Figure.of("kernels", "", 1300),), (), "timed"),
        Finding("", True, "a | b", (), (), "said"),
    )
    usual = Result("driver", machine, "2026-11-26T19:00:00+00:00", 12.5, True, findings)

    def make(**changes: Any) -> Result:
        return replace(usual, **changes)

    return make
