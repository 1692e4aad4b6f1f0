"""The interface of a backend: lanes of execution in which graphs are bound to arrays and run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import DeviceArray, Memory
from sg_runtime.manifest import GraphFacts

Call = Callable[[], None]
"""One run of a graph over the arrays it was bound to. On a GPU the call only submits the run."""


class Lane(Protocol):
    """A serial sequence of runs, ordered by the stream of its memory.

    Only one thread at a time may use a lane.
    """

    memory: Memory

    def enter(self) -> None:
        """Make the lane current in the calling thread, until `memory.leave`.

        Raises DeviceError if its device was lost.
        """
        ...

    def release(self) -> None:
        """Free what the backend can allocate again for calls that are made later."""
        ...

    def bind(
        self,
        graph: GraphFacts,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        *,
        fixed: bool = False,
    ) -> Call:
        """Bind the graph to these arrays. Return a call that runs it and keeps the arrays alive.

        outputs: the requested outputs. fixed: whether the call is made many times, so that its
        launch may be captured. Raises EngineError if the backend cannot open the graph, either now
        or when the call is made.
        """
        ...

    def sequence(self, calls: Sequence[Call]) -> "CallSequence":
        """Return these calls as a sequence that is played as a unit, more than once."""
        ...


class Backend(Protocol):
    """Runner of one bundle's graphs. Several threads can use it, each in a separate lane.

    name: name of the backend, as in `BACKENDS`.
    lanes: maximum number of lanes, None if unlimited.
    batches: supported image counts of a run, None if any count is supported.
    """

    name: str
    lanes: int | None
    batches: tuple[int, ...] | None

    def lane(self) -> Lane:
        """Return a new lane. All lanes share the weights."""
        ...

    def at(self, bundle: Bundle) -> "Backend":
        """Return the backend for another size of its bundle, possibly this one; see `Bundle.at`."""
        ...

    def keep(self) -> None:
        """Write what runs have added to caches to disk, so that the next start is faster.

        It is called after every run, and does nothing if nothing was added.
        """
        ...


class CallSequence:
    """Calls that are made one after another."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = tuple(calls)

    def play(self, done: Callable[[int], None]) -> None:
        """Make all calls without waiting for the device.

        done: called with the index of each call after that call.
        """
        for number, call in enumerate(self.calls):
            call()
            done(number)
