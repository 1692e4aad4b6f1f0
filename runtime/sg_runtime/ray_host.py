"""What every use of Ray in this process needs: its settings, its start, and room for workers."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sg_runtime.errors import DeviceError

ANSWER = 30.0
"""Seconds that a server of a cluster has to answer."""

Nodes = Mapping[str, Mapping[str, float]]
"""Resources of each node that is alive, by its number."""


@dataclass(frozen=True, slots=True)
class Need:
    """Cores and GPUs of a worker; a GPU may be shared."""

    cpus: int
    gpus: float

    def workers(self, nodes: Nodes) -> int:
        """Return the number of workers that these nodes hold."""
        wanted = {name: share for name, share in (("CPU", self.cpus), ("GPU", self.gpus)) if share}
        return sum(
            min(int(held.get(name, 0) / share + 1e-9) for name, share in wanted.items()) for held in nodes.values()
        )

    def __str__(self) -> str:
        return f"{self.cpus} CPU{'s' * (self.cpus > 1)}" + f" and {self.gpus:g} GPU" * bool(self.gpus)


def nodes_of(ray: Any) -> Nodes:
    """Return the nodes of the cluster that this process is connected to."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def keep_ray_private(alone: bool) -> bool:
    """Set Ray's variables so that it reports no usage and prints nothing.

    Call it before Ray is imported.

    alone: whether Ray runs on this machine alone. Then its servers listen to 127.0.0.1.
    Returns whether they will: a Ray that is imported already has read its variables.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else its libraries print on standard error
    if not alone or "ray" in sys.modules:
        return False
    # On the systems of this name Ray's address is 127.0.0.1, which is wanted here.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return True


def connect(ray: Any, address: str, **settings: Any) -> None:
    """Connect this process to a cluster of Ray, or start one on this machine.

    address: address of the cluster; "" for a new one. settings: of `ray.init` for a new one.
    Raises DeviceError if no cluster answers.
    """
    where, remedy = "on this machine", "free memory or processes"
    if address:
        where, remedy = f"at {address}", "start one with ray start, on this machine too, or leave the address out"
        settings = {}
    try:
        _try_address(address)
        with _unchanged():
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **settings)
    except Exception as error:  # of Ray, some have no class of their own
        raise DeviceError(
            f"Ray: expected a cluster {where}, found none that answers ({first_line(error)}): {remedy}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error, or its type. What a task of Ray raised is its cause."""
    told = getattr(error, "cause", None) or error
    return (str(told).strip() or type(told).__name__).splitlines()[0]


def _try_address(address: str) -> None:
    """Raise OSError if nothing answers at HOST:PORT. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


@contextmanager
def _unchanged() -> Iterator[None]:
    """Restore the handler of SIGTERM after the block, and discard its standard error.

    Ray's handler ends the process in its own way, and its libraries print that
    RAY_BACKEND_LOG_LEVEL is set. What fails is raised.
    """
    before, kept = signal.getsignal(signal.SIGTERM), os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
