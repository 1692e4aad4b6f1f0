"""What every use of Ray in this process needs: settings, and a start that changes nothing else."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def starting_ray() -> Iterator[None]:
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
