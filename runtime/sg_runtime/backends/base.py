"""What every backend is: lanes of execution, in which graphs are bound to arrays and run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from sg_runtime.devices.memory import DeviceArray, Memory
from sg_runtime.manifest import GraphFacts

Call = Callable[[], None]
"""One run of a graph over the arrays that it was bound to. On a GPU it only asks for the run."""


class Lane(Protocol):
    """A sequence of runs, one after the other, in the order of its memory's stream. Of one thread at a time."""

    memory: Memory

    def enter(self) -> None:
        """Make it the lane of the calling thread. Raises DeviceError for one that was lost."""
        ...

    def bind(
        self,
        graph: GraphFacts,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        *,
        fixed: bool = False,
    ) -> Call:
        """A run of the graph over these arrays, which the call keeps.

        outputs: those that are wanted. fixed: the call is made many times, so its launch may be captured.
        Raises EngineError where the backend cannot open the graph, now or when the call is made.
        """
        ...

    def sequence(self, calls: Sequence[Call]) -> "CallSequence":
        """These calls, to be made together, more than once."""
        ...


class Backend(Protocol):
    """Runs graphs of one bundle; safe to use from several threads, in a lane each.

    name: as in `BACKENDS`. lanes: how many it can have, None for as many as one likes. batches: the image counts that
    a run can have, None for any.
    """

    name: str
    lanes: int | None
    batches: tuple[int, ...] | None

    def lane(self) -> Lane:
        """A new lane, which shares the weights of all."""
        ...

    def keep(self) -> None:
        """Leave on disk what makes the next start faster."""
        ...


class CallSequence:
    """Calls that are made one after the other."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = tuple(calls)

    def play(self, done: Callable[[int], None]) -> None:
        """Make all calls, without waiting for the device. done: called with the number of each."""
        for number, call in enumerate(self.calls):
            call()
            done(number)
