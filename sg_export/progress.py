"""How long work tells how far it is."""

from typing import Protocol


class Report(Protocol):
    """Called at the start of every stage, and within those that know how far they are."""

    def __call__(self, stage: str, done: int, total: int | None, share: float | None = None) -> None:
        """stage: what is done now. done: stages before it, of `total`, None while unknown. share: of this stage."""
        ...


def silent(stage: str, done: int, total: int | None, share: float | None = None) -> None:
    """Report to nobody."""


class Counted:
    """Reports stages by their number among all."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self, stage: str) -> None:
        """A stage begins."""
        self._report(stage, self._done, self._total)
        self._done += 1

    def stage(self, stage: str, share: float | None = None) -> None:
        """What is done within the stage that began last."""
        self._report(stage, max(self._done - 1, 0), self._total, share)
