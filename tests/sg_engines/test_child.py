"""Builds in a child process: they give the same engine, and a failed one leaves nothing."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sg_engines.child
from sg_engines.child import LESS_MEMORY, build_in_child
from sg_engines.trt import EngineRecipe
from sg_runtime.errors import EngineError

Products = Mapping[str, Path]
Children = list["subprocess.Popen[str]"]


def ignore(phase: str, done: int, steps: int) -> None:
    """Ignore progress."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Path of an engine to build, in an empty folder."""
    (tmp_path / "engines").mkdir()
    return tmp_path / "engines/product.engine"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    """The processes that builds start."""
    started: Children = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return started


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that makes a library from the given lines and returns its name."""

    def library(lines: str) -> Any:
        (tmp_path / "libraries").mkdir()
        (tmp_path / "libraries/sg_library.py").write_text(lines)
        monkeypatch.syspath_prepend(tmp_path / "libraries")
        return "sg_library"

    return library


SLOW = """
import time
import tensorrt_rtx

class Builder(tensorrt_rtx.Builder):
    def build_serialized_network(self, network, config):
        built = super().build_serialized_network(network, config)
        time.sleep(600)
        return built

def __getattr__(name):
    return getattr(tensorrt_rtx, name)
"""
"""A library whose build does not end: anything done at its first report happens during a build."""


def refused(library: Any, graph: Path, plan: EngineRecipe, output: Path, progress: Any = ignore) -> str:
    """Return the message of a build that fails and leaves nothing."""
    with pytest.raises(EngineError) as caught:
        build_in_child(library, graph, plan, output, progress)
    assert caught.value.exit_code == 4
    assert list(output.parent.iterdir()) == []
    return str(caught.value)


def test_build_in_child_gives_the_bytes_that_this_process_builds(
    products: Products, plan: EngineRecipe, engine: Path, output: Path
) -> None:
    events: list[tuple[str, int, int]] = []
    figures = build_in_child("tensorrt_rtx", products["fp16"], plan, output, lambda *event: events.append(event))
    assert output.read_bytes() == engine.read_bytes()
    assert list(output.parent.iterdir()) == [output]
    assert events[-1] == ("Building engine from subgraph", 1, 1)
    assert 0 < figures.seconds < 60
    assert 50e6 < figures.memory_bytes < 2e9, "the child's memory: at least the library, less than this process"


def test_build_in_child_passes_the_plan_on(products: Products, plan: EngineRecipe, output: Path) -> None:
    """This process and the child build the same engine from several profiles, GPUs and a limit."""
    whole = replace(plan, profiles=({"x": (2, 16)}, {"x": (3, 16)}), compute_capabilities=(80, 89), workspace=1 << 28)
    build_in_child("tensorrt_rtx", products["fp16"], whole, output, ignore)
    here = output.with_name("here.engine")
    sg_engines.child.build_engine(sys.modules["tensorrt_rtx"], products["fp16"], whole, here, ignore)
    assert output.read_bytes() == here.read_bytes()


def test_build_in_child_passes_warnings_on(
    products: Products, plan: EngineRecipe, engine: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = output.parent / "none" / "timing.cache"
    build_in_child("tensorrt_rtx", products["fp16"], replace(plan, timing_cache=path), output, ignore)
    assert output.read_bytes() == engine.read_bytes()
    assert caplog.messages == [f"timing cache {path}: not written (No such file or directory)"]


def test_build_in_child_of_what_the_library_refuses_gives_its_reason(
    products: Products, plan: EngineRecipe, output: Path
) -> None:
    message = refused("tensorrt_rtx", products["fp32"], replace(plan, compute_capabilities=(75,)), output)
    assert message.startswith("fp32.onnx: TensorRT-RTX ")
    assert "FP32 GEMM is not supported" in message


def test_build_in_child_into_a_folder_that_is_not_there_names_it(
    products: Products, plan: EngineRecipe, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"No such file or directory: '.*/none/\.product\.engine.*\.partial'"):
        build_in_child("tensorrt_rtx", products["fp16"], plan, tmp_path / "none/product.engine", ignore)


def test_build_in_child_that_runs_out_of_memory_says_what_to_do(
    products: Products, plan: EngineRecipe, output: Path, library: Callable[[str], Any]
) -> None:
    message = refused(library("raise MemoryError"), products["fp16"], plan, output)
    assert message == f"fp16.onnx: memory ran out: {LESS_MEMORY}"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, f"was killed, as the system does when memory runs out: {LESS_MEMORY}"),
        (signal.SIGTERM, "ended by SIGTERM: it printed nothing"),
        (signal.SIGSEGV, "ended by SIGSEGV: it printed nothing"),
    ],
)
def test_build_in_child_that_dies_by_a_signal_says_by_which(
    products: Products,
    plan: EngineRecipe,
    output: Path,
    library: Callable[[str], Any],
    children: Children,
    number: signal.Signals,
    expected: str,
) -> None:
    message = refused(library(SLOW), products["fp16"], plan, output, lambda *event: children[0].send_signal(number))
    assert message == f"fp16.onnx: the build process {expected}"


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ("import os; os.write(2, b'1\\n2\\n3\\n4\\n5\\n 6 \\n'); os._exit(3)", 3, "2 3 4 5 6"),
        ("import os; os._exit(0)", 0, "it printed nothing"),
    ],
)
def test_build_in_child_that_ends_early_gives_its_code_and_last_words(
    products: Products,
    plan: EngineRecipe,
    output: Path,
    library: Callable[[str], Any],
    lines: str,
    code: int,
    words: str,
) -> None:
    """If the process does not report a result, even exit code 0 is not a success."""
    message = refused(library(lines), products["fp16"], plan, output)
    assert message == f"fp16.onnx: the build process ended with exit code {code}: {words}"


def test_build_in_child_that_raises_gives_the_last_of_its_traceback(
    products: Products, plan: EngineRecipe, output: Path, library: Callable[[str], Any]
) -> None:
    message = refused(library("raise ImportError('libcudart.so.13: not found')"), products["fp16"], plan, output)
    assert message.startswith("fp16.onnx: the build process ended with exit code 1: ")
    assert message.endswith("ImportError: libcudart.so.13: not found")


def test_build_in_child_that_does_not_read_its_request_gives_its_code(
    products: Products, plan: EngineRecipe, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is larger than a pipe: the process ends before it is completely written."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    large = replace(plan, profiles=({f"input{number}": (1, 2, 3) for number in range(20_000)},))
    message = refused("tensorrt_rtx", products["fp16"], large, output)
    assert message == "fp16.onnx: the build process ended with exit code 1: it printed nothing"


def test_build_in_child_that_is_interrupted_ends_the_child_and_leaves_nothing(
    products: Products, plan: EngineRecipe, output: Path, library: Callable[[str], Any], children: Children
) -> None:
    """Ctrl-C arrives while the parent waits for the child's next event."""

    def interrupt(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_in_child(library(SLOW), products["fp16"], plan, output, interrupt)
    (child,) = children
    assert child.returncode == -signal.SIGKILL, "the child was also waited for"
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_child_leaves_signals_of_the_terminal_to_its_parent(
    number: int, products: Products, plan: EngineRecipe, engine: Path, output: Path, children: Children
) -> None:
    """A terminal sends both signals to both processes; the parent ends the child."""
    build_in_child("tensorrt_rtx", products["fp16"], plan, output, lambda *event: children[0].send_signal(number))
    assert output.read_bytes() == engine.read_bytes()


NOISY = """
import os
import tensorrt_rtx
print('{"error": "printed"}', flush=True)
os.write(1, b'{"memory_bytes": 1}\\nno JSON\\n')

def __getattr__(name):
    os.system("echo from a program")
    return getattr(tensorrt_rtx, name)
"""


def test_build_in_child_takes_nothing_that_the_library_prints_for_an_event(
    products: Products, plan: EngineRecipe, engine: Path, output: Path, library: Callable[[str], Any]
) -> None:
    events: list[str] = []
    figures = build_in_child(library(NOISY), products["fp16"], plan, output, lambda phase, *steps: events.append(phase))
    assert output.read_bytes() == engine.read_bytes()
    assert figures.memory_bytes > 1
    assert "Building engine from subgraph" in events


# The rest of the child's side runs in this process.


@pytest.fixture
def events_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """Return a function that runs the child's program in this process and returns its events."""
    handlers, standard_output = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP)}, os.dup(1)
    opened = ExitStack()  # a process that ends closes its output

    def fdopen(number: int, mode: str) -> Any:
        return opened.enter_context(open(number, mode))

    def events_of(**request: Any) -> list[Any]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
        with (tmp_path / "events").open("wb") as stream:
            os.dup2(stream.fileno(), 1)
        with monkeypatch.context() as patch, opened:
            patch.setattr(os, "fdopen", fdopen)
            sg_engines.child._main()
        return [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]

    yield events_of
    os.dup2(standard_output, 1)
    os.close(standard_output)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def request_of(products: Products, plan: EngineRecipe, output: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a request as the parent writes it."""

    def request_of(kind: str, library: str = "tensorrt_rtx", **changes: Any) -> dict[str, Any]:
        content = sg_engines.child._plan_content(replace(plan, **changes))
        return {"library": library, "graph": str(products[kind]), "output": str(output), "plan": content}

    return request_of


def test_main_tells_phases_and_the_memory_at_last(
    events_of: Callable[..., list[Any]], request_of: Callable[..., dict[str, Any]], engine: Path, output: Path
) -> None:
    *phases, last = events_of(**request_of("fp16"))
    assert output.read_bytes() == engine.read_bytes()
    assert phases[-1] == {"phase": "Building engine from subgraph", "done": 1, "steps": 1}
    assert last.keys() == {"memory_bytes"}


def test_main_tells_an_error_last(
    events_of: Callable[..., list[Any]], request_of: Callable[..., dict[str, Any]], output: Path
) -> None:
    *_, last = events_of(**request_of("fp32", compute_capabilities=(75,)))
    assert last.keys() == {"error"}
    assert "FP32 GEMM is not supported" in last["error"]
    assert not output.exists()


def test_main_tells_that_memory_ran_out(
    events_of: Callable[..., list[Any]],
    request_of: Callable[..., dict[str, Any]],
    library: Callable[[str], Any],
) -> None:
    (event,) = events_of(**request_of("fp16", library("raise MemoryError")))
    assert event == {"error": "fp16.onnx: memory ran out"}


@pytest.mark.parametrize("cache", [None, Path("/caches/timing.cache")])
def test_plan_goes_through_json_unchanged(cache: Path | None) -> None:
    plan = EngineRecipe(({"x": (2, 16), "keep": (2, 4)}, {"x": (3, 16)}), (86, 120), 1 << 30, cache)
    content = json.loads(json.dumps(sg_engines.child._plan_content(plan)))
    assert sg_engines.child._plan(content) == plan


def test_build_in_child_without_enough_memory_says_what_to_do(
    products: Products, plan: EngineRecipe, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address space is large enough to load the library but too small to build.

    The place of the failure and its message vary.
    """
    interpreter(tmp_path, monkeypatch, f'ulimit -v 490000; exec {sys.executable} "$@"')
    with pytest.raises(EngineError) as caught:
        build_in_child(
            "tensorrt_rtx", products["fp16"], plan, output, ignore, silence=20
        )  # a thread that cannot start may hang the build
    lacking = re.search("bad_alloc|allocate memory", str(caught.value))
    assert lacking is None or "build fewer sparsities or batch sizes at once" in str(caught.value)
    assert not list(output.parent.iterdir())


def test_build_in_child_that_says_nothing_is_ended(
    products: Products, plan: EngineRecipe, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter(tmp_path, monkeypatch, "cat > /dev/null; exec sleep 60")
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"fp16.onnx: .* was ended: expected progress within 0.5 s, found none"):
        build_in_child("tensorrt_rtx", products["fp16"], plan, output, ignore, silence=0.5)
    assert time.monotonic() - began < 30
    assert not list(output.parent.iterdir())


def interpreter(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make the children of this process run a shell script instead of Python.

    preexec_fn is not used: it forks a process with many threads, and the child can wait forever for
    a lock that one of them holds.
    """
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
