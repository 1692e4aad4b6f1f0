"""The order of waiting images. It has no thread, no lock and no clock of its own."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sg_runtime.errors import QueueFullError
from sg_runtime.service.request import Group, Request
from sg_runtime.service.statistics import Parts


@dataclass(slots=True, eq=False)
class Entry:
    """A request in a service.

    future: gets the answer.
    arrived: time of its arrival, in seconds of a monotonic clock.
    deadline: latest time at which its last run may begin; None for any.
    taken: number of its images that runs have taken.
    images: the images that are complete, by place.
    parts: seconds spent on it.
    led: number of images of each run whose first image is of this request.
    """

    request: Request
    group: Group
    future: "Future[Any]"
    arrived: float
    deadline: float | None = None
    taken: int = 0
    images: dict[int, NDArray[Any]] = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts)
    led: list[int] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Number of its images that no run has taken."""
        return len(self.request.seeds) - self.taken


class Slot(NamedTuple):
    """An image in a run: the image at `place` of an entry."""

    entry: Entry
    place: int


class Queue:
    """Waiting images by group, first come, first served.

    batch: maximum number of images of a run.
    window: seconds for which the first image of a group waits for others.
    limit: maximum number of waiting images.
    """

    def __init__(self, batch: int, window: float, limit: int) -> None:
        self.batch, self.window, self.limit = batch, window, limit
        self._groups: dict[Group, deque[Entry]] = {}
        self.images = 0

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries with waiting images."""
        for entries in self._groups.values():
            yield from entries

    def add(self, entry: Entry, retry_after: float = 1.0) -> None:
        """Append an entry. Raises QueueFullError if its images are beyond the limit.

        retry_after: seconds after which the caller may try again, for the error.
        """
        wanted = entry.waiting
        if self.images + wanted > self.limit:
            advice = f"try again in {retry_after:.0f} s" if wanted <= self.limit else "ask for fewer images"
            raise QueueFullError(
                f"queue: expected at most {self.limit} waiting images, found {self.images} and a request of {wanted}: "
                f"{advice}, or start the service with a larger `queue`",
                retry_after,
            )
        self._groups.setdefault(entry.group, deque()).append(entry)
        self.images += wanted

    def remove(self, entry: Entry) -> None:
        """Remove an entry with its waiting images, if it is in the queue."""
        entries = self._groups.get(entry.group)
        if entries is not None and entry in entries:
            entries.remove(entry)
            self.images -= entry.waiting
            self._drop_empty(entry.group)

    def expired(self, now: float) -> list[Entry]:
        """Remove and return the entries whose deadline has passed."""
        late = [entry for entry in self if entry.deadline is not None and entry.deadline <= now]
        for entry in late:
            self.remove(entry)
        return late

    def take(self, now: float) -> list[Slot]:
        """Remove and return the images of the next run; none if no group is due.

        A group is due if it fills a run, or if its first image has waited for the window. Of the
        groups that are due, the one whose first image has waited longest comes first.
        """
        due = [group for group in self._groups if self._due(group) <= now]
        if not due:
            return []
        group = min(due, key=lambda group: self._groups[group][0].arrived)
        slots: list[Slot] = []
        entries = self._groups[group]
        while entries and len(slots) < self.batch:
            entry = entries[0]
            slots.append(Slot(entry, entry.taken))
            entry.taken += 1
            if not entry.waiting:
                entries.popleft()
        self.images -= len(slots)
        self._drop_empty(group)
        return slots

    def wait(self, now: float) -> float | None:
        """Return the seconds until a group is due or an entry expires; None if nothing waits."""
        times = [self._due(group) for group in self._groups]
        times += [entry.deadline for entry in self if entry.deadline is not None]
        return max(min(times) - now, 0.0) if times else None

    def _due(self, group: Group) -> float:
        """Return the time at which a group is due, which has passed if the group fills a run."""
        entries, images = self._groups[group], 0
        for entry in entries:
            images += entry.waiting
            if images >= self.batch:
                return entries[0].arrived
        return entries[0].arrived + self.window

    def _drop_empty(self, group: Group) -> None:
        if not self._groups[group]:
            del self._groups[group]
