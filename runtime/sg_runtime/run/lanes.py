"""A pool of lanes, shared by threads.

A thread leases one for a run and reuses the buffers that earlier runs left in it.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from sg_runtime.backends.base import Backend, Lane
from sg_runtime.errors import DeviceError, DeviceMemoryError, UsageError
from sg_runtime.manifest import Manifest
from sg_runtime.run.budget import fitting, run_bytes
from sg_runtime.run.workspace import Workspace

WORKSPACES = 2
"""Maximum number of workspaces that a lane keeps."""


class LanePool:
    """Pool of lanes, created on demand up to the maximum number of the backend."""

    def __init__(self, manifest: Manifest, backend: Backend, beside: "LanePool | None" = None) -> None:
        """Make an empty pool. beside: a pool for another size; the maximum is for both together."""
        self._manifest, self._backend = manifest, backend
        self._idle: list[LaneState] = []
        self._places = None if backend.lanes is None else threading.BoundedSemaphore(backend.lanes)
        if beside is not None:
            self._places = beside._places
        self._lock = threading.Lock()
        self._lost: str | None = None

    @contextmanager
    def lease(self) -> Iterator["LaneState"]:
        """Lease a lane to the calling thread alone; wait if all lanes of the backend are leased.

        After an error the lane's buffers are dropped. If the device itself was lost, this lease and
        all later ones raise DeviceError.
        """
        if self._places is not None:
            self._places.acquire()
        try:
            if self._lost is not None:
                raise DeviceError(self._lost)
            with self._lock:
                leased = self._idle.pop() if self._idle else None
            leased = leased or LaneState(self._manifest, self._backend.lane(), self._backend.batches)
            leased.lane.enter()
            try:
                yield leased
            except UsageError:
                raise  # raised before any work: the buffers are intact
            except BaseException as error:
                leased.release()
                self._check_device(leased.lane, error)
                raise
            finally:
                leased.lane.memory.leave()
                with self._lock:
                    self._idle.append(leased)
        finally:
            if self._places is not None:
                self._places.release()

    def release(self) -> None:
        """Free the buffers of all idle lanes, and what the backend holds for them."""
        with self._lock:
            for leased in self._idle:
                leased.release()
                leased.lane.release()

    def _check_device(self, lane: Lane, cause: BaseException) -> None:
        """Raise DeviceError, now and in every later lease, if the device no longer responds.

        Then the backend is never destroyed. ONNX Runtime destroys captured CUDA graphs with its
        sessions, and ends the process if CUDA returns an error
        (https://github.com/microsoft/onnxruntime/pull/32081).
        """
        try:
            lane.memory.wait()
        except DeviceError as error:
            if self._lost is None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object((lane, self._backend)))
            self._lost = (
                f"{lane.memory.device}: the device was lost and this pipeline with it: start the process again "
                f"({error}; the error before it: {cause})"
            )
            raise DeviceError(self._lost) from cause


class LaneState:
    """A lane and its most recently used workspaces."""

    def __init__(self, manifest: Manifest, lane: Lane, batches: tuple[int, ...] | None) -> None:
        self.lane = lane
        self._manifest, self._batches = manifest, batches
        self._workspaces: OrderedDict[tuple[int, int, bool], Workspace] = OrderedDict()

    def workspace(self, batch: int, evaluations: int, separate: bool) -> Workspace:
        """Return the workspace of these sizes; create it if the lane does not have it.

        Raises DeviceMemoryError if the free memory does not suffice. The message says what fits.
        """
        key = (batch, evaluations, separate)
        if key not in self._workspaces:
            needed, free = run_bytes(self._manifest, *key), self.lane.memory.free_bytes()
            if free is not None and needed > free:
                self.release()
                self.lane.release()
                free = self.lane.memory.free_bytes()
            if free is not None and needed > free:
                raise DeviceMemoryError(
                    f"{self.lane.memory.device}: runs of {batch} images with the conditioning of {evaluations} "
                    f"evaluations at a time need {needed / 1e6:,.0f} MB, found {free / 1e6:,.0f} MB free; "
                    f"{fitting(self._manifest, self._batches, batch, evaluations, separate, free)}"
                )
            self._workspaces[key] = Workspace(self.lane, self._manifest, batch, evaluations)
        self._workspaces.move_to_end(key)
        while len(self._workspaces) > WORKSPACES:
            self._workspaces.popitem(last=False)
        return self._workspaces[key]

    def release(self) -> None:
        """Free all buffers."""
        self._workspaces.clear()
