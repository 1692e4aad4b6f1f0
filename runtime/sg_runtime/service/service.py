"""One thread that owns a pipeline and runs the requests of all callers in it."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Conditions, parse
from sg_runtime.errors import (
    BundleError,
    DeadlineError,
    DeviceError,
    DeviceMemoryError,
    NonFiniteError,
    RefusedError,
    SgError,
    UsageError,
)
from sg_runtime.files import sha256_of, state_of
from sg_runtime.manifest import MANIFEST_FILE, Labels
from sg_runtime.manifest.base import flag, number, whole_number
from sg_runtime.pipeline import Pipeline
from sg_runtime.service.queue import Entry, Queue, Slot
from sg_runtime.service.request import Group, Request, checked
from sg_runtime.service.statistics import PARTS, Part, Parts, Statistics

LOG = logging.getLogger("sg_runtime")

CLOCK = time.monotonic


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Settings of a service.

    window: seconds for which the first image of a group waits for others that can share its run.
    queue: maximum number of waiting images. A request beyond it is refused.
    pad: whether each run has as many images as the pipeline's batch, some of them discarded. Then
        an image is the same bit for bit, whatever it was batched with. Otherwise a run has the
        images that wait, and an image is the same up to rounding.
    """

    window: float = 0.005
    queue: int = 64
    pad: bool = True

    def __post_init__(self) -> None:
        flag("pad", self.pad)
        if not 0 <= number("window", self.window) <= 60:
            raise UsageError(f"window: expected 0 to 60 seconds, found {self.window:g}")
        if whole_number("queue", self.queue) < 1:
            raise UsageError(f"queue: expected at least 1 image, found {self.queue}")


@dataclass(frozen=True, slots=True)
class Answer:
    """The images of a request.

    images: (N, H, W, C) uint8, in the order of its seeds.
    parts: seconds that it took.
    led: number of images of each run whose first image is of this request. Over all answers, every
        run is counted once.
    """

    images: NDArray[np.uint8]
    parts: Parts
    led: tuple[int, ...]


class Service:
    """Serves requests from a pipeline, in one thread. `submit` may be called from any thread."""

    def __init__(self, pipe: Pipeline, settings: ServiceSettings | None = None) -> None:
        """Start the thread. Nobody else may use the pipeline.

        Raises UsageError if the pipeline gives no images, and BundleError if its bundle was
        replaced since it was loaded.
        """
        if not pipe.gives_images:
            raise UsageError(
                f"{pipe.bundle.path}: expected a bundle that gives images, found one that samples latents and holds "
                f"no decoder: build it with `vae` FOLDER"
            )
        self.settings = settings or ServiceSettings()
        self.manifest = pipe.bundle.manifest
        self.batch = pipe.batch
        self._pipes = {self.manifest.model.size: pipe}
        self._bundle = pipe.bundle
        self._manifest_file = self._bundle.root / MANIFEST_FILE
        self.fingerprint = sha256_of(self._manifest_file)
        self._manifest_seen = state_of(self._manifest_file)
        if self.manifest not in (view.manifest for view in Bundle.open(self._bundle.root).views):
            raise BundleError(
                f"{self._bundle.path}: expected the bundle that was loaded, found another one: load it again"
            )
        self._lost: DeviceError | None = None
        self._queue = Queue(pipe.batch, self.settings.window, self.settings.queue)
        self._changed = threading.Condition()
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._runs: Counter[int] = Counter()
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS[1:], 0.0)
        self._longest = 0
        self._image_seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="sg-service", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, *, timeout: float | None = None) -> "Future[Answer]":
        """Queue a request. Return the future of its answer, which may be cancelled at any time.

        timeout: seconds within which its last run must begin; None for any.

        Raises UsageError if the bundle cannot serve the request, QueueFullError if the queue has no
        room, and RefusedError if the service is closed. The future raises DeadlineError, or an
        error of `Pipeline.sample`. An error of one request does not concern the others of its run.
        """
        now = CLOCK()
        try:
            group = checked(self.manifest, request)
            future: Future[Answer] = Future()
            entry = Entry(request, group, future, now, None if timeout is None else now + timeout)
            with self._changed:
                if self._closed:
                    raise RefusedError("service: expected an open one, found a closed one: start it again")
                self._queue.add(entry, max(1.0, self._queue.images * self._image_seconds))
                self._counts["requests"] += 1
                self._longest = max(self._longest, self._queue.images)
                self._changed.notify()
        except SgError:
            with self._changed:
                self._counts["refused"] += 1
            raise
        future.add_done_callback(lambda _: self._ended(entry))
        return future

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let no run begin within the block, so that all requests of the block can share runs.

        The block must not wait for an answer.
        """
        with self._changed:  # its lock may be taken again by the same thread
            yield

    def statistics(self) -> Statistics:
        """Return what the service has done since it started."""
        with self._changed:
            counts = {name: self._counts[name] for name in _COUNTS}
            return Statistics(
                **counts,
                queued=self._queue.images,
                longest=self._longest,
                runs=dict(sorted(self._runs.items())),
                seconds=dict(self._seconds),
            )

    def check(self) -> None:
        """Raise the error with which every request would end.

        That is BundleError if the bundle on the disk is not the one that was loaded, DeviceError if
        the device was lost, and RefusedError if the service is closed.
        """
        if self._lost is not None:
            raise self._lost
        if self._closed:
            raise RefusedError("service: expected an open one, found a closed one: start it again")
        if not self._thread.is_alive():
            raise RefusedError("service: expected its thread to run, found it ended: start the service again")
        self._check_bundle()

    def close(self) -> None:
        """Refuse all waiting requests, and wait for the run in progress."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        """Run requests until the service is closed."""
        while True:
            with self._changed:
                while True:
                    now = CLOCK()
                    late = self._queue.expired(now)
                    slots = [] if self._closed else self._queue.take(now)
                    if late or slots or self._closed:
                        break
                    self._changed.wait(self._queue.wait(now))
                left = [*self._queue] if self._closed else []
            for entry in late:
                self._fail(entry, _late(entry))
            for entry in left:
                self._fail(entry, RefusedError("service: closed before the request was run: ask another one"))
            if slots:
                self._run(slots, CLOCK())
            elif self._closed:
                return

    def _run(self, slots: Sequence[Slot], began: float) -> None:
        """Sample the images of a run.

        If one request is at fault, the others run again without it.
        """
        slots = [slot for slot in slots if not slot.entry.future.done()]
        if not slots:
            return
        entries = list(dict.fromkeys(slot.entry for slot in slots))
        try:
            images, parts = self._images(slots)
        except (NonFiniteError, UsageError) as error:
            if len(entries) == 1:
                self._fail(entries[0], error)
            else:
                for entry in entries:
                    self._run([slot for slot in slots if slot.entry is entry], began)
            return
        except Exception as error:
            if isinstance(error, DeviceError) and not isinstance(error, DeviceMemoryError):
                self._lost = error
            if not isinstance(error, SgError):
                LOG.exception("service: unexpected %s in a run", type(error).__name__)
            for entry in entries:
                self._fail(entry, error)
            return
        with self._changed:
            self._runs[len(slots)] += 1
            self._counts["images"] += len(slots)
            for name, seconds in parts.items():
                self._seconds[name] += seconds
            each = sum(parts.values()) / len(slots)
            self._image_seconds = each if not self._image_seconds else 0.8 * self._image_seconds + 0.2 * each
        slots[0].entry.led.append(len(slots))
        for entry in entries:
            if not entry.images:
                entry.parts.wait = began - entry.arrived
            for name, seconds in parts.items():
                setattr(entry.parts, name, getattr(entry.parts, name) + seconds)
        for (entry, place), image in zip(slots, images, strict=True):
            entry.images[place] = image
        for entry in entries:
            if len(entry.images) == len(entry.request.seeds):
                self._answer(entry)

    def _images(self, slots: Sequence[Slot]) -> tuple[NDArray[np.uint8], dict[Part, float]]:
        """Return the image of each slot, (B, H, W, C) uint8, and the seconds by part."""
        self._check_bundle()
        group, padding = slots[0].entry.group, self.batch - len(slots) if self.settings.pad else 0
        padded = [*slots, *[slots[-1]] * padding]
        times = [CLOCK()]
        pipe = self._pipe(group)
        conditions = _conditions(pipe, group, padded)
        times.append(CLOCK())
        seeds = [entry.request.seeds[place] for entry, place in padded]
        x = pipe.sample(conditions, seeds, steps=group.steps, sampler=group.sampler, guidance=group.guidance)
        times.append(CLOCK())
        images = pipe.decode(x[: len(slots)])
        times.append(CLOCK())
        return images, {name: end - start for name, (start, end) in zip(PARTS[1:], pairwise(times), strict=True)}

    def _pipe(self, group: Group) -> Pipeline:
        """Return the pipeline of a group's size. It is opened on first use."""
        if group.size not in self._pipes:
            self._pipes[group.size] = self._pipes[self.manifest.model.size].at(*group.size)
        return self._pipes[group.size]

    def _check_bundle(self) -> None:
        """Raise BundleError if the bundle on the disk is not the one that was loaded."""
        if (seen := state_of(self._manifest_file)) != self._manifest_seen:
            try:
                found = sha256_of(self._manifest_file)
            except OSError:
                found = "none"
            if found != self.fingerprint:
                raise BundleError(
                    f"{self._bundle.path}: expected the bundle that the service loaded (manifest "
                    f"{self.fingerprint[:12]}…), found another one ({found[:12]}): start the service again"
                )
            self._manifest_seen = seen
        self._bundle.check_unchanged(*self.manifest.files)

    def _answer(self, entry: Entry) -> None:
        answer = Answer(
            np.stack([entry.images[place] for place in range(len(entry.images))]), entry.parts, tuple(entry.led)
        )
        if entry.future.set_running_or_notify_cancel():
            entry.future.set_result(answer)

    def _fail(self, entry: Entry, error: Exception) -> None:
        if not entry.future.done() and entry.future.set_running_or_notify_cancel():
            entry.future.set_exception(error)

    def _ended(self, entry: Entry) -> None:
        """Count the end of a request. Remove the rest of it from the queue."""
        error = None if entry.future.cancelled() else entry.future.exception()
        kinds: dict[str, Any] = {
            "cancelled": entry.future.cancelled(),
            "expired": isinstance(error, DeadlineError),
            "failed": error is not None,
        }
        with self._changed:
            self._queue.remove(entry)
            self._counts[next((name for name, found in kinds.items() if found), "answered")] += 1
            self._changed.notify()


_COUNTS = ("requests", "answered", "failed", "expired", "cancelled", "refused", "images")


def _conditions(pipe: Pipeline, group: Group, slots: Sequence[Slot]) -> Conditions:
    """Return the conditions of the images of a run. Prompts are encoded."""
    given = [entry.request.conditions[place] for entry, place in slots]
    if isinstance(pipe.bundle.manifest.model.conditions, Labels):
        return parse(pipe.bundle.manifest.model, given)
    prompts = [None if name is None else str(name) for name in given]
    negative = [entry.request.negative or "" for entry, _ in slots] if group.guidance.row.null_weak else None
    return pipe.from_text(prompts, negative)


def _late(entry: Entry) -> DeadlineError:
    """Return the error of a request whose deadline has passed."""
    allowed = (entry.deadline or entry.arrived) - entry.arrived
    return DeadlineError(
        f"request: expected its last run to begin within {allowed:.3g} s, found {entry.waiting} of "
        f"{len(entry.request.seeds)} images waiting after {CLOCK() - entry.arrived:.3g} s: try again later, or allow "
        f"more time"
    )
