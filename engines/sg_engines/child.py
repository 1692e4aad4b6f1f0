"""Engine builds in a child process.

A crash, a lack of memory or Ctrl-C then ends only the child. The child runs
`python -m sg_engines.child`. It reads one request as JSON from stdin and writes events to stdout,
one JSON object a line.
"""

import dataclasses
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sg_engines.trt import LOG, EngineRecipe, Progress, build_engine
from sg_runtime.errors import EngineError
from sg_runtime.host import peak_memory
from sg_runtime.manifest import EngineLibrary

LESS_MEMORY = "build fewer sparsities or batch sizes at once (`sparsity`, `batch`), or give a smaller `workspace`"


@dataclass(frozen=True, slots=True)
class BuildFigures:
    """Wall time of a build in seconds, and peak memory of its process in bytes."""

    seconds: float
    memory_bytes: int


SILENCE = 3600.0
"""Seconds without progress after which a build is ended. Large builds report far more often."""


def build_in_child(
    library: EngineLibrary, graph: Path, plan: EngineRecipe, output: Path, progress: Progress, silence: float = SILENCE
) -> BuildFigures:
    """Run `build_engine` in a child process.

    silence: seconds without progress after which the child is killed. Raises EngineError with the
    reason that the child reported. If the child died without a report, the error names the likely
    cause.
    """
    request = {"library": library, "graph": str(graph), "output": str(output), "plan": _plan_content(plan)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", errors="replace") as words,
        _running([sys.executable, "-m", "sg_engines.child"], words, environment) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        final: dict[str, Any] = {}
        watch = _Watch(child, silence)
        try:
            child.stdin.write(json.dumps(request))
            child.stdin.close()
            for line in watch.lines(child.stdout):
                event = json.loads(line)
                if "phase" in event:
                    progress(event["phase"], event["done"], event["steps"])
                elif "warning" in event:
                    LOG.warning("%s", event["warning"])
                else:
                    final = event
        except BrokenPipeError:
            pass  # the child died; its exit code says why
        code = child.wait()
        words.seek(0)
        last_words = words.readlines()[-5:]
    if "error" in final:
        raise EngineError(_with_remedy(final["error"]))
    if watch.ended:
        raise EngineError(
            f"{graph.name}: the build process was ended: expected progress within {silence:g} s, found none; build "
            f"again; if that fails too, report it with the versions that sg-export doctor prints"
        )
    if code != 0 or not final:
        raise EngineError(_with_remedy(f"{graph.name}: the build process {_died(code, last_words)}"))
    return BuildFigures(time.monotonic() - began, final["memory_bytes"])


class _Watch:
    """A watchdog that kills a process if it prints nothing for `silence` seconds."""

    def __init__(self, child: "subprocess.Popen[str]", silence: float) -> None:
        self.ended = False
        self._child, self._silence = child, silence

    def lines(self, output: IO[str]) -> Iterator[str]:
        """Yield the lines of `output`. Every line restarts the timer."""
        timer = self._start()
        try:
            for line in output:
                timer.cancel()
                timer = self._start()
                yield line
        finally:
            timer.cancel()

    def _start(self) -> threading.Timer:
        timer = threading.Timer(self._silence, self._end)
        timer.daemon = True
        timer.start()
        return timer

    def _end(self) -> None:
        self.ended = True
        self._child.kill()


def _with_remedy(reason: str) -> str:
    """Return the reason; if it is a lack of memory, add the remedy.

    The library words a lack of memory in several ways.
    """
    return (
        f"{reason}: {LESS_MEMORY}"
        if re.search("bad_alloc|memory r[au]n|out of ?memory|allocate memory", reason, re.I)
        else reason
    )


def _died(code: int, last_words: list[str]) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out"
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{how}: {' '.join(line.strip() for line in last_words) or 'it printed nothing'}"


@contextmanager
def _running(command: list[str], errors: IO[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process that is killed when the block exits for any reason.

    Its stderr goes to `errors`.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def _plan_content(plan: EngineRecipe) -> dict[str, Any]:
    content = dataclasses.asdict(plan)
    return content | {"timing_cache": None if plan.timing_cache is None else str(plan.timing_cache)}


def _plan(content: dict[str, Any]) -> EngineRecipe:
    cache = content["timing_cache"]
    return EngineRecipe(
        tuple({name: tuple(shape) for name, shape in profile.items()} for profile in content["profiles"]),
        tuple(content["compute_capabilities"]),
        content["workspace"],
        None if cache is None else Path(cache),
    )


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal also tells the parent, which kills this process
        signal.signal(number, signal.SIG_IGN)
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that the library prints must not mix with the events
    request = json.load(sys.stdin)
    forward = _Forward(events)
    LOG.addHandler(forward)
    try:
        build_engine(
            importlib.import_module(request["library"]),
            Path(request["graph"]),
            _plan(request["plan"]),
            Path(request["output"]),
            lambda phase, done, steps: _tell(events, {"phase": phase, "done": done, "steps": steps}),
        )
    except MemoryError:
        _tell(events, {"error": f"{Path(request['graph']).name}: memory ran out"})
    except (EngineError, OSError) as error:
        _tell(events, {"error": str(error)})
    else:
        _tell(events, {"memory_bytes": peak_memory()})
    finally:
        LOG.removeHandler(forward)


class _Forward(logging.Handler):
    """A handler that sends warnings to the parent."""

    def __init__(self, events: IO[str]) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        _tell(self._events, {"warning": record.getMessage()})


def _tell(events: IO[str], event: dict[str, Any]) -> None:
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except BrokenPipeError:  # the parent is gone; the library would swallow the exception and go on building
        os._exit(1)


if __name__ == "__main__":
    _main()
