"""The order of waiting images: groups, windows, deadlines and the limit."""

from collections.abc import Sequence
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_runtime.errors import QueueFullError
from sg_runtime.manifest import GuidancePlan, Level
from sg_runtime.service.queue import Entry, Queue, Slot
from sg_runtime.service.request import Group, Request


def group(steps: int) -> Group:
    return Group((8, 8), steps, "euler", GuidancePlan("none", Level(0.0, 16), Level(0.0, 16), 1.0))


def entry(images: int, steps: int = 1, arrived: float = 0.0, deadline: float | None = None) -> Entry:
    request = Request(("A",) * images, tuple(range(images)), steps=steps)
    return Entry(request, group(steps), Future(), arrived, deadline)


def places(slots: Sequence[Slot], entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Return the images of a run as (number of the entry, place)."""
    return [(entries.index(slot.entry), slot.place) for slot in slots]


def test_take_before_the_window_ends_waits_and_after_it_takes_what_is_there() -> None:
    queue, one = Queue(4, 1.0, 10), entry(2, arrived=5.0)
    queue.add(one)
    assert queue.take(5.9) == []
    assert queue.wait(5.5) == pytest.approx(0.5)
    assert places(queue.take(6.0), [one]) == [(0, 0), (0, 1)]
    assert (queue.images, queue.wait(6.0)) == (0, None)


def test_take_of_a_full_run_does_not_wait_for_the_window() -> None:
    queue, entries = Queue(4, 1.0, 10), [entry(3), entry(2, arrived=0.1)]
    for one in entries:
        queue.add(one)
    assert places(queue.take(0.1), entries) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert queue.take(0.2) == []
    assert places(queue.take(1.1), entries) == [(1, 1)]


def test_take_of_other_steps_is_another_run_and_the_older_comes_first() -> None:
    queue, entries = Queue(4, 0.0, 10), [entry(1, steps=2), entry(1, steps=3, arrived=0.1), entry(1, 2, 0.2)]
    for one in entries:
        queue.add(one)
    assert places(queue.take(1.0), entries) == [(0, 0), (2, 0)]
    assert places(queue.take(1.0), entries) == [(1, 0)]


def test_take_of_a_full_group_leaves_an_older_one_to_its_window() -> None:
    queue, entries = Queue(2, 1.0, 10), [entry(1, steps=2), entry(2, steps=3, arrived=0.1)]
    for one in entries:
        queue.add(one)
    assert places(queue.take(0.1), entries) == [(1, 0), (1, 1)]


def test_add_beyond_the_limit_names_what_is_there_and_leaves_the_queue_as_it_was() -> None:
    queue = Queue(2, 1.0, 4)
    queue.add(entry(3))
    with pytest.raises(QueueFullError) as caught:
        queue.add(entry(2), retry_after=7.0)
    assert str(caught.value) == (
        "queue: expected at most 4 waiting images, found 3 and a request of 2: try again in 7 s, or start the service "
        "with a larger `queue`"
    )
    assert caught.value.retry_after == 7.0
    queue.add(entry(1))
    assert queue.images == 4


def test_add_of_more_than_the_limit_alone_advises_fewer_images() -> None:
    many = entry(0)
    many.request = Request((), range(10**9))  # type: ignore[arg-type]  # a tuple would fill the memory
    with pytest.raises(QueueFullError, match=r"found 0 and a request of 1000000000: ask for fewer images"):
        Queue(2, 1.0, 4).add(many)


def test_expired_entry_leaves_the_queue_with_the_images_that_no_run_took() -> None:
    queue, entries = Queue(2, 0.0, 10), [entry(3, deadline=2.0), entry(1, deadline=3.0)]
    for one in entries:
        queue.add(one)
    assert queue.wait(0.0) == 0.0
    assert len(queue.take(1.0)) == 2
    assert queue.expired(1.9) == []
    assert queue.expired(2.0) == entries[:1]
    assert places(queue.take(2.0), entries) == [(1, 0)]
    assert queue.images == 0


def test_wait_ends_at_a_deadline_before_the_window() -> None:
    queue = Queue(2, 1.0, 10)
    queue.add(entry(1, deadline=0.25))
    assert queue.wait(0.0) == 0.25


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from("ark")), min_size=1, max_size=30),
    st.integers(1, 4),
)
def test_queue_gives_each_image_once_in_order_of_its_group(actions: list[tuple[int, int, str]], batch: int) -> None:
    """Actions are arrivals (a), runs (r) and removals of the oldest waiting entry (k)."""
    queue, entries, removed, taken = Queue(batch, 0.0, 1000), [], set(), []
    for now, (images, steps, action) in enumerate(actions):
        entries.append(entry(images, steps, arrived=float(now)))
        queue.add(entries[-1])
        if action == "r":
            taken.append(queue.take(float(now)))
        elif action == "k":
            first = next(iter(queue))
            queue.remove(first)
            removed.add(entries.index(first))
        assert queue.images == sum(one.waiting for one in queue)
    while run := queue.take(1e9):
        taken.append(run)
    assert all(1 <= len(run) <= batch and len({slot.entry.group for slot in run}) == 1 for run in taken)
    found = [place for run in taken for place in places(run, entries)]
    assert len(found) == len(set(found))
    expected = {(k, place) for k, one in enumerate(entries) for place in range(len(one.request.seeds))}
    assert {place for place in expected if place[0] not in removed} <= set(found)
    for steps in (1, 2, 3):
        own = [place for place in found if entries[place[0]].group.steps == steps]
        assert own == sorted(own)
    assert queue.images == 0
