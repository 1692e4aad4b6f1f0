"""Run a job by Ray Data: a pool of actors samples the shards, and this process writes them."""

import contextlib
import logging
import os
import pickle
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

from sg_runtime.bulk.formats import File
from sg_runtime.bulk.job import Job, Request, plan
from sg_runtime.bulk.run import ShardSampler
from sg_runtime.errors import DeviceError, UsageError
from sg_runtime.extras import require
from sg_runtime.host import usable_cores
from sg_runtime.ray_host import ANSWER, Need, connect, first_line, keep_ray_private, nodes_of

LOG = logging.getLogger("sg_runtime")

POLL = 2.0
"""Seconds between two looks at the nodes of the cluster."""

PATIENCE = 60.0
"""Seconds that a job waits for a node when none is left that can hold a worker."""

TRIES = 8
"""Times that a shard is begun. One that is lost more often has a cause of its own, such as too
little memory."""

SHARD_LIMIT = 1 << 30
"""Most bytes of pixels of a shard. Ray carries it as one value of an Arrow table, below 2 GB."""

GONE = "the complete shards stay: start the same command again when the cluster works"


class RayWorkers:
    """Actors in a Ray cluster: one for each GPU, or for each group of cores."""

    def __init__(self, ray: Any, request: Request) -> None:
        """Plan the job on a worker, as this machine need not be like those of the cluster.

        Raises UsageError if no node can hold a worker, and the errors of `plan`.
        """
        self._ray = ray
        nodes = nodes_of(ray)
        cores = max((int(held.get("CPU", 0)) for held in nodes.values()), default=0)
        threads = request.threads or max(1, cores)
        request = replace(request, bundle=request.bundle.absolute(), threads=threads)
        wants_gpu = request.device != "cpu" and request.backend != "onnxruntime-cpu"
        on_gpu = wants_gpu and any(held.get("GPU", 0) >= 1 for held in nodes.values())
        need = Need(1, 1) if on_gpu else Need(threads, 0)
        if not need.workers(nodes):
            raise UsageError(
                f"expected a node of the Ray cluster with {need} for a worker, found at most {cores}: lower `threads`"
            )
        planning = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(_planned).remote(request)
        with _errors_of(ray):
            if not ray.wait([planning], timeout=PATIENCE)[0]:
                LOG.warning("waiting for a worker with %s in the Ray cluster that is free", need)
            self.job: Job = _raised(ray.get(planning))
        if prod(self.job.shape) * self.job.shard > SHARD_LIMIT:
            raise UsageError(
                f"shard: expected at most {SHARD_LIMIT // prod(self.job.shape)} images of this size with `ray`, found "
                f"{self.job.shard}"
            )
        self._need = Need(self.job.threads, 0) if self.job.backend == "onnxruntime-cpu" else need
        self._request = request.continuing(self.job)

    def shards(self, missing: Sequence[int], done: Callable[[int], None]) -> Iterator[tuple[int, list[File]]]:
        """Yield the shards as they are complete; see `Workers`.

        Ray gives a shard whose worker is lost to another one. Raises DeviceError if no node is left
        that can hold a worker, or if a worker ends again and again.
        """
        if not missing:
            return
        data = require("ray.data", "ray")
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        here = require("ray.util.scheduling_strategies", "ray").NodeAffinitySchedulingStrategy(
            self._ray.get_runtime_context().get_node_id(), soft=True
        )
        ledger = self._ray.remote(num_cpus=0, scheduling_strategy=here)(_Ledger).remote()
        watch = _Watch(self._ray, self._need, ledger)
        rows = data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing)).map_batches(
            _Actor,
            fn_constructor_args=(self._request, self.job, ledger),
            batch_size=1,
            # A worker has one shard at a time, so that no other one is lost with it.
            compute=data.ActorPoolStrategy(
                # With no place for a worker now, `_Watch` waits for a node.
                size=max(1, min(len(missing), self._need.workers(nodes_of(self._ray)))),
                max_tasks_in_flight_per_actor=1,
            ),
            num_cpus=self._need.cpus,
            num_gpus=self._need.gpus,
        )
        with _errors_of(self._ray):
            for row in _watched(rows.iter_rows, watch):
                files: list[File] = _raised(pickle.loads(row["content"]))
                done(len(self.job.images(row["shard"])))
                yield row["shard"], files
            with contextlib.suppress(DeviceError):  # all shards are complete
                watch.look()


class _Ledger:
    """An actor that counts how often each shard was begun."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, shard: int) -> None:
        """Count a shard that is begun."""
        self._begun[shard] += 1

    def again(self) -> dict[int, int]:
        """Return how often each shard was begun that was begun more than once."""
        return {shard: times for shard, times in self._begun.items() if times > 1}


class _Actor:
    """A worker: a pipeline that is opened with its first shard."""

    def __init__(self, request: Request, job: Job, ledger: Any) -> None:
        self._request, self._job, self._ledger = request, job, ledger
        self._sample: ShardSampler | None = None

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the files of a shard, pickled, or the error in their place."""
        shard = int(rows["shard"][0])
        ray = require("ray")
        with contextlib.suppress(ray.exceptions.RayError):  # a lost ledger costs messages alone
            ray.get(self._ledger.begin.remote(shard), timeout=ANSWER)
        content = pickle.dumps(_caught(lambda: self._files(shard)), protocol=5)
        return {"shard": [shard], "content": [content]}

    def _files(self, shard: int) -> list[File]:
        if self._sample is None:
            self._sample = ShardSampler(self._request.load()[0], self._job)
        return self._sample(shard, lambda images: None)


class _Watch:
    """The nodes of a cluster and the shards that were begun, looked at now and then."""

    def __init__(self, ray: Any, need: Need, ledger: Any) -> None:
        self._ray, self._need, self._ledger = ray, need, ledger
        self._known, self._again = nodes_of(ray), dict[int, int]()
        self._looked = self._held = time.monotonic()

    def __call__(self) -> None:
        """Warn of nodes and shards that were lost.

        Raises DeviceError if no worker had a place for long, or if a shard is lost again and again.
        """
        if time.monotonic() - self._looked >= POLL:
            self.look()

    def look(self) -> None:
        """Look now."""
        self._looked = now = time.monotonic()
        nodes = nodes_of(self._ray)
        for node in self._known.keys() - nodes.keys():
            LOG.warning("node %s of the Ray cluster was lost", node[:12])
        self._known = nodes
        if self._need.workers(nodes):
            self._held = now
        elif now - self._held > PATIENCE:
            raise DeviceError(f"Ray: expected a node with {self._need}, found none for {PATIENCE:.0f} s: {GONE}")
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._look_at(self._ray.get(self._ledger.again.remote(), timeout=ANSWER))

    def _look_at(self, again: dict[int, int]) -> None:
        for shard, times in again.items():
            if times > self._again.get(shard, 1):
                LOG.warning("shard %d was lost with its worker: it is sampled again", shard)
            if times > TRIES:
                raise DeviceError(
                    f"Ray: shard {shard}: expected a worker that completes it, found {TRIES} that ended: give workers "
                    f"more memory, or lower `batch` or `shard` in another `output`; the complete shards stay"
                )
        self._again = again


@contextmanager
def ray_workers(request: Request, address: str) -> Iterator[RayWorkers]:
    """Connect to a Ray cluster, and plan the job there.

    address: address of the cluster. "" is the cluster that this process is connected to. If it has
    none, "" starts one that ends with the block and answers to this machine alone.

    Raises MissingExtraError without the extra ray, UsageError for an address in a process that is
    connected, and DeviceError if no cluster answers.
    """
    keep_ray_private(not address)
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a thread that ends late starts a cluster of its own
    ray = require("ray")
    if ray.is_initialized():
        if address:
            raise UsageError(f"cluster {address}: expected no address, since this process is connected to Ray: give ''")
        yield RayWorkers(ray, request)
        return
    with contextlib.ExitStack() as opened:
        settings: dict[str, Any] = {}
        if not address:
            logs = opened.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            cores = max(usable_cores(), request.threads or 1)
            settings = {"num_cpus": cores, "include_dashboard": False, "_temp_dir": logs}
        opened.callback(ray.shutdown)
        # Else Ray prints on standard output which workers were lost. It has no public switch.
        ray._private.worker._worker_logs_enabled = False
        connect(ray, address, **settings)
        yield RayWorkers(ray, request)


def _planned(request: Request) -> Job | Exception:
    """Return the job of a request; runs on a worker."""

    def job() -> Job:
        pipe, bundle = request.load()
        return plan(request, pipe, bundle)

    found: Job | Exception = _caught(job)
    return found


@contextmanager
def _errors_of(ray: Any) -> Iterator[None]:
    """Raise DeviceError in place of errors of Ray."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise DeviceError(
            f"Ray: expected workers that sample, found an error of Ray ({first_line(error)}): {GONE}"
        ) from error


def _caught(make: Callable[[], Any]) -> Any:
    """Return what a function returns, or the error that it raises.

    An error that a worker raised would be Ray's, and its own type and words lost.
    """
    try:
        return make()
    except Exception as error:
        return error


def _raised(found: Any) -> Any:
    """Return what `_caught` returned. Raises it if it is an error."""
    if isinstance(found, Exception):
        raise found
    return found


def _watched(rows: Callable[[], Iterator[Mapping[str, Any]]], watch: Callable[[], None]) -> Iterator[Mapping[str, Any]]:
    """Yield rows that a thread takes from Ray Data, and look at the cluster in between."""
    found: queue.Queue[Any] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return found.put(item, timeout=0.2)

    def take() -> None:
        try:
            for row in rows():
                put(row)
                if stopped.is_set():
                    return
            put(None)
        except Exception as error:
            put(error)

    thread = threading.Thread(target=take, name="rows of Ray Data", daemon=True)
    thread.start()
    try:
        while True:
            watch()
            with contextlib.suppress(queue.Empty):
                row = found.get(timeout=POLL)
                if row is None:
                    return
                yield _raised(row)
    finally:
        stopped.set()
        thread.join(timeout=5)
