"""Progress reporting for long operations."""

from typing import Protocol


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
