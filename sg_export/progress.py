"""Progress reporting for long operations."""

import time
from collections.abc import Callable
from typing import Protocol

TELL_SECONDS = 10.0
"""Seconds between two reports of a rate."""


class Report(Protocol):
    """A callback for progress. It is called at the start of each stage and during some stages."""

    def __call__(self, stage: str, done: int, total: int | None, share: float | None = None) -> None:
        """Report the state of an operation.

        stage: what is being done.
        done: number of finished stages.
        total: number of all stages; None while it is unknown.
        share: finished share of this stage, from 0 to 1; None if it is unknown.
        """
        ...


def silent(stage: str, done: int, total: int | None, share: float | None = None) -> None:
    """Discard the report."""


class Counted:
    """Counter of stages, which adds their number to each report."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self, stage: str) -> None:
        """Report the start of the next stage."""
        self._report(stage, self._done, self._total)
        self._done += 1

    def stage(self, stage: str, share: float | None = None) -> None:
        """Report progress within the current stage."""
        self._report(stage, max(self._done - 1, 0), self._total, share)


def with_rate(report: Report, unit: str, per: float = 1.0, *, resumes: bool = False) -> Callable[[int, int], None]:
    """Return a callback (done, of all) that reports sampling, and now and then the rate.

    unit: what the rate counts, such as "steps".
    per: number of them for each that is done; a step of Heun has two evaluations.
    resumes: whether the first call says what was done before.
    """
    began = told = time.monotonic()
    stage, first = "sampling", None if resumes else 0

    def advance(done: int, total: int) -> None:
        nonlocal began, told, stage, first
        now = time.monotonic()
        if first is None:
            began, first = now, done
        elif now - told >= TELL_SECONDS:
            rate = (done - first) / (now - began)
            told, stage = now, f"sampling, {rate * per:.3g} {unit}/s, {time_text((total - done) / rate)} left"
        report(stage, max(done - 1, 0), total)

    return advance


def time_text(seconds: float) -> str:
    """Return a time in seconds, or from ten minutes on in hours and minutes, h:mm."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 600 else f"{minutes // 60}:{minutes % 60:02} h"
