"""What every use of Ray in this process needs: its settings, and our own handler of signals."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def keep_ray_private(alone: bool) -> bool:
    """Set Ray's variables so that it reports no usage. Call it before Ray is imported.

    alone: whether Ray runs on this machine alone. Then its servers listen to 127.0.0.1.
    Returns whether they will: a Ray that is imported already has read its variables.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not alone or "ray" in sys.modules:
        return False
    # On the systems of this name Ray's address is 127.0.0.1, which is wanted here.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return True


@contextmanager
def own_signals() -> Iterator[None]:
    """Restore the handler of SIGTERM after the block. Ray's ends the process in its own way."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
