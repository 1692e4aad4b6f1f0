"""The process that answers HTTP: its socket, its key, its logs."""

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sg_export.serving.app import Limits, make_app
from sg_export.serving.deployment import ReplicaSettings, deployed
from sg_export.serving.logs import LOG, JsonLines, log
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError

KEY = "SG_EXPORT_API_KEY"
"""Environment variable with the key that clients must give."""

SHUTDOWN_SECONDS = 10
"""Seconds for which a server that ends lets requests finish."""


def run(
    bundles: Mapping[str, Bundle],
    host: str,
    port: int,
    settings: ReplicaSettings,
    limits: Limits,
    *,
    cluster: str | None = None,
    started: Callable[[str], object] = print,
) -> None:
    """Serve bundles by HTTP until a signal ends the process.

    started: called with the address when the server answers. Raises UsageError if the port is
    taken, and SgError if a bundle cannot be served.
    """
    import uvicorn

    key = api_key()
    if limits.images > settings.service.queue:
        raise UsageError(
            f"`images`: expected at most `queue` {settings.service.queue}, as a request of more would never be served, "
            f"found {limits.images}: lower `images`, or give a larger `queue`"
        )
    with listening(host, port) as bound, json_lines(), deployed(bundles, settings, cluster) as engines:
        app = make_app(engines, limits, key)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        address = "http://{}:{}".format(f"[{host}]" if ":" in host else host, bound.getsockname()[1])
        log(logging.INFO, "serving", address=address, models=list(bundles), key=key is not None)
        if key is None and not _loopback(bound):
            log(logging.WARNING, f"anybody who reaches {address} can ask for images: set {KEY}")
        started(address)
        uvicorn.Server(config).run(sockets=[bound])


def api_key() -> str | None:
    """Return the key that clients must give; None if there is none.

    Raises UsageError if it cannot be sent in a header.
    """
    key = os.environ.get(KEY)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError(
            f"{KEY}: expected visible ASCII characters, found {'none' if not key else 'others'}: set another"
        )
    return key


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that is bound to an address. Raises UsageError if it cannot be bound.

    port: 0 for any that is free.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"`host` {host}: expected an address of this machine, found none ({error})") from None
    with bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            # Another process that binds without listening is found here.
            bound.listen(2048)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"`port` {port}: expected a free port of {host}, found one that another process listens on: give "
                    f"another, or 0 for any"
                ) from None
            raise UsageError(f"`host` {host}, `port` {port}: cannot be bound ({error.strerror}): give others") from None
        yield bound


def _loopback(bound: socket.socket) -> bool:
    """Whether a socket takes connections of its own machine alone."""
    address = str(bound.getsockname()[0])
    return address == "::1" or address.startswith("127.")


@contextmanager
def json_lines() -> Iterator[None]:
    """Write the logs of the server, and the warnings of its HTTP library, as lines of JSON."""
    handler, logs = JsonLines(), {LOG: logging.INFO, logging.getLogger("uvicorn"): logging.WARNING}
    before: dict[logging.Logger, Any] = {each: (each.level, each.propagate) for each in logs}
    for each, level in logs.items():
        each.addHandler(handler)
        each.setLevel(level)
        each.propagate = False
    try:
        yield
    finally:
        for each, (level, propagate) in before.items():
            each.removeHandler(handler)
            each.setLevel(level)
            each.propagate = propagate
