"""How long work tells how far it is."""

from typing import Protocol


class Report(Protocol):
    """Called at the start of every stage, and within those that know how far they are."""

    def __call__(self, stage: str, done: int, total: int | None, share: float | None = None) -> None:
        """stage: what is done now. done: stages before it, of `total`, None while unknown. share: of this stage."""
        ...


def silent(stage: str, done: int, total: int | None, share: float | None = None) -> None:
    """Report to nobody."""
