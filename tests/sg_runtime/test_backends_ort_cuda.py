"""ONNX Runtime's CUDA provider, run with stand-ins for its sessions and for the driver.

The stand-ins run the same graphs on the CPU. Whether the provider itself works: `test_ort_check`.
"""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_stand_in import CUresult, Driver
from numpy.typing import NDArray
from ort_stand_in import Sessions

import sg_runtime.backends.choice
import sg_runtime.backends.ort
from sg_runtime.backends.ort import OwnThread
from sg_runtime.backends.ort_weights import DeviceWeights, weights_of
from sg_runtime.bundle import Bundle
from sg_runtime.devices.cuda import CudaMemory, use_gpu
from sg_runtime.devices.memory import HostMemory
from sg_runtime.errors import DeviceError, DeviceMemoryError, EngineError, UsageError
from sg_runtime.pipeline import Pipeline

CLASSES, SEEDS, STEPS = [0, 1, None], [5, 6, 7], 3
DISTURBED = "CUDA failure 901: operation failed due to a previous error during capture"
NOT_CAPTURED = "runs are not captured as CUDA graphs, each is launched kernel by kernel: "


@pytest.fixture
def sessions(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    """Replace the sessions of ONNX Runtime by stand-ins."""
    stand_in = Sessions(driver)
    monkeypatch.setattr(sg_runtime.backends.ort, "open_session", stand_in.open)
    monkeypatch.setattr(sg_runtime.backends.choice, "check_cuda_provider", lambda number: None)
    return stand_in


@pytest.fixture
def load(sessions: Sessions, tiny_bundle: Path) -> Callable[..., Pipeline]:
    return lambda **how: Pipeline.load(tiny_bundle, backend="onnxruntime-cuda", **how)


@pytest.fixture
def pipe(load: Callable[..., Pipeline]) -> Pipeline:
    return load()


@pytest.fixture(scope="module")
def on_cpu(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle, "cpu")


def sample(pipe: Pipeline, **how: Any) -> NDArray[np.float32]:
    found: NDArray[np.float32] = pipe.sample(CLASSES, SEEDS, **{"steps": STEPS, **how})
    return found


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# Samples and captures.


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("capture", [True, False])
def test_sample_equals_that_of_the_cpu_in_every_run(
    load: Callable[..., Pipeline], sessions: Sessions, on_cpu: Pipeline, sampler: str, capture: bool
) -> None:
    pipe, expected = load(capture=capture), sample(on_cpu, sampler=sampler)
    evaluations = STEPS if sampler == "euler" else 2 * STEPS - 1
    for run in range(1, 4):
        close(sample(pipe, sampler=sampler), expected)
        assert (sessions.captures, sessions.replays) == ((evaluations, run * evaluations) if capture else (0, 0))


def test_sample_from_200_threads_in_turn_captures_once(pipe: Pipeline, sessions: Sessions) -> None:
    """ONNX Runtime keeps captured graphs for each thread. One thread makes all runs."""
    pipe.warmup(1, steps=2)
    assert sessions.captures == 2
    expected, found = pipe.sample([0], [0], steps=2), []
    for _ in range(200):
        thread = threading.Thread(target=lambda: found.append(pipe.sample([0], [0], steps=2)))
        thread.start()
        thread.join(60)
    assert len(found) == 200
    np.testing.assert_array_equal(found, [expected] * 200)
    assert sessions.captures == 2
    assert len(sessions.threads) == 1
    assert threading.get_ident() not in sessions.threads


def test_sample_from_threads_together_is_that_of_one(pipe: Pipeline, sessions: Sessions) -> None:
    expected = [sample(pipe, steps=1 + number % 3) for number in range(8)]
    captures = sessions.captures
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: sample(pipe, steps=1 + number % 3), range(8)))
    for own, one in zip(found, expected, strict=True):
        close(own, one)
    assert captures >= 3
    assert len(sessions.threads) == 1


def test_release_frees_the_captured_graphs(pipe: Pipeline, sessions: Sessions, driver: Driver) -> None:
    """Sessions without captured graphs stay open."""
    expected = sample(pipe)
    assert sessions.graphs == STEPS
    weights = driver.used
    pipe.release()
    assert sessions.graphs == 0
    assert driver.used < weights
    opened = len(sessions.opened)
    close(sample(pipe), expected)
    assert [path.stem for path, _, _ in sessions.opened[opened:]] == ["guided-16-8"]
    assert sessions.graphs == STEPS


def test_sample_of_ever_other_lengths_keeps_a_limited_number_of_graphs(
    pipe: Pipeline, sessions: Sessions, on_cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in never gives an address out again, so each new workspace has new graphs."""
    monkeypatch.setattr(sg_runtime.backends.ort, "UNUSED_GRAPHS", 10)
    lengths = [2, 3, 4, 5]
    expected = {steps: sample(on_cpu, steps=steps) for steps in lengths}
    most = 0
    for steps in lengths * 5:
        close(sample(pipe, steps=steps), expected[steps])
        most = max(most, sessions.graphs)
    # Two workspaces, up to the limit in each of two sessions, and the new workspace.
    assert sum(lengths) < most <= 2 * (10 + 2 * max(lengths))
    assert sessions.captures == 5 * sum(lengths)


def test_bind_of_the_same_arrays_shares_a_captured_graph(pipe: Pipeline, sessions: Sessions) -> None:
    """The addresses alone do not suffice: a graph is captured for its shapes."""
    lane = pipe.backend.lane()
    graph = pipe.bundle.manifest.hoisted("main")[0]
    lane.enter()
    t, labels = lane.memory.hold(np.linspace(0, 1, 4, dtype=np.float32)), lane.memory.hold(np.zeros(4, np.int64))
    table = lane.memory.empty((4, pipe.bundle.manifest.model.held["modulations"][0]), np.float32)

    def run(rows: int) -> NDArray[Any]:
        lane.bind(graph, {"t": t[:rows], "class": labels[:rows]}, {"modulations": table[:rows]}, fixed=True)()
        found: NDArray[Any] = lane.memory.download(table[:rows])
        return found

    first = run(4)
    np.testing.assert_array_equal(run(4), first)
    assert (sessions.captures, sessions.replays) == (1, 2)
    assert run(2).shape == (2, table.shape[1])
    assert sessions.captures == 2
    lane.memory.leave()


# Captures that fail.


@pytest.mark.parametrize("text", [DISTURBED, "Failed to allocate memory for requested buffer of size 4096"])
def test_sample_whose_capture_fails_goes_on_without(
    pipe: Pipeline, sessions: Sessions, driver: Driver, on_cpu: Pipeline, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The capture is left open, as by a provider that fails in it. There is one warning."""
    sessions.refuses["capture"] = text
    for _ in range(3):
        close(sample(pipe), sample(on_cpu))
    assert sessions.captures == 1
    (message,) = caplog.messages
    assert message.startswith(NOT_CAPTURED)
    assert message.endswith(text)
    assert not [stream for stream in driver.streams if driver.capturing(stream)]


def test_sample_while_another_library_allocates_goes_on_without(
    pipe: Pipeline, sessions: Sessions, driver: Driver, on_cpu: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Graphs that were captured before stay in use."""
    sample(pipe, steps=1)

    def allocate() -> None:
        """Allocate as PyTorch does, which knows nothing of the capture."""
        (status,) = driver.cuMemAlloc(4)
        assert status == CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED

    sessions.during = allocate
    for _ in range(2):
        close(sample(pipe), sample(on_cpu))
    assert [message.startswith(NOT_CAPTURED) for message in caplog.messages] == [True]
    assert DISTURBED in caplog.text
    assert (sessions.captures, sessions.graphs) == (2, 1)
    replays = sessions.replays
    close(sample(pipe, steps=1), sample(on_cpu, steps=1))
    assert sessions.replays == replays + 1


def test_sample_while_another_pipeline_drops_its_arrays_is_captured(
    pipe: Pipeline, sessions: Sessions, driver: Driver, on_cpu: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """The arrays are freed after the capture."""
    memory = CudaMemory()
    kept = [memory.empty((1000,), np.float32) for _ in range(STEPS)]
    sessions.during = kept.pop
    before = driver.used
    close(sample(pipe), sample(on_cpu))
    assert not kept
    assert (sessions.captures, caplog.messages) == (STEPS, [])
    pipe.release()
    assert driver.used <= before - STEPS * 4000


def test_sample_of_sessions_that_cannot_capture_opens_them_without(
    pipe: Pipeline, sessions: Sessions, on_cpu: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    sessions.refuses["open"] = "guided.onnx: nodes have not been assigned"
    close(sample(pipe), sample(on_cpu))
    assert caplog.messages == [f"{NOT_CAPTURED}guided.onnx: nodes have not been assigned"]
    assert sessions.captures == 0


def test_sample_without_enough_memory_is_that_error(pipe: Pipeline, sessions: Sessions, on_cpu: Pipeline) -> None:
    """Both the capture and the plain run fail. Later runs are captured."""
    sample(pipe, steps=1)
    sessions.refuses["run"] = "Failed to allocate memory for requested buffer of size 4096"
    with pytest.raises(DeviceMemoryError, match="Failed to allocate memory") as caught:
        sample(pipe)
    assert caught.value.exit_code == 6
    sessions.refuses.clear()
    close(sample(pipe), sample(on_cpu))
    assert sessions.graphs >= STEPS


def test_sample_of_a_graph_that_fails_is_that_error(pipe: Pipeline, sessions: Sessions) -> None:
    sessions.refuses["run"] = "Non-zero status code returned while running MatMul node"
    with pytest.raises(EngineError, match=r"condition\.onnx: ONNX Runtime failed: Non-zero status") as caught:
        sample(pipe)
    assert caught.value.exit_code == 4


# A device that is lost.


@pytest.mark.parametrize("status", [CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE])
def test_sample_on_a_gpu_that_vanishes_ends_in_an_exception(
    load: Callable[..., Pipeline], driver: Driver, status: CUresult
) -> None:
    """Sessions are never destroyed after that: ONNX Runtime would end the process."""
    pipe = load()
    sample(pipe)
    alive = [weakref.ref(opened.session) for opened in pipe.backend._sessions.values()]  # type: ignore[attr-defined]

    def vanish(done: int, total: int) -> None:
        driver.statuses |= {"cuStreamSynchronize": status, "cuMemcpyDtoHAsync": status}

    for progress in (vanish, None):
        with pytest.raises(DeviceError, match=f"the device was lost .* gave {status.name}") as caught:
            sample(pipe, progress=progress)
        assert caught.value.exit_code == 6
    del pipe, caught
    gc.collect()
    assert [session() for session in alive if session() is None] == []
    assert len(alive) == 2


# Callers.


def test_progress_that_raises_stops_the_run(pipe: Pipeline, sessions: Sessions, on_cpu: Pipeline) -> None:
    """It is called in the caller's thread. No run is submitted after the error is raised."""

    def stop(done: int, total: int) -> None:
        assert threading.get_ident() not in sessions.threads
        raise ValueError("stop")

    with pytest.raises(ValueError, match=r"^stop$"):
        sample(pipe, progress=stop)
    submitted = sessions.runs
    close(sample(on_cpu), sample(on_cpu))
    assert sessions.runs == submitted
    calls: list[tuple[int, int]] = []
    close(sample(pipe, progress=lambda *now: calls.append(now)), sample(on_cpu))
    assert calls == [(number, STEPS) for number in range(1, STEPS + 1)]


def test_own_thread_does_the_work_of_all_and_ends_with_its_object() -> None:
    own = OwnThread("own")
    assert own.do(partial(own.do, threading.get_ident)) == own.do(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        own.do(lambda: 1 // 0)
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("own"))
    del own
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("current", [None, 1])
def test_run_leaves_the_callers_gpu_current(driver: Driver, load: Callable[..., Pipeline], current: int | None) -> None:
    driver.count = 2
    if current is not None:
        use_gpu(current)
    pipe = load()
    assert driver.current == current
    found = pipe.sample_on_device(CLASSES, SEEDS, steps=1)
    assert driver.current == current
    with pytest.raises(UsageError):
        pipe.guided(np.zeros((1, 1), np.float32), pipe.prepare_once(0.5, [0]))
    assert driver.current == current
    del found
    pipe.release()
    assert driver.current == current


@pytest.mark.parametrize("default", [0, 1, 2])
def test_sample_in_a_default_stream_starts_after_the_callers_work(
    driver: Driver, load: Callable[..., Pipeline], on_cpu: Pipeline, default: int
) -> None:
    pipe = load(stream=SimpleNamespace(cuda_stream=default))
    done: list[str] = []
    driver.put(default, lambda: done.append("before"))
    close(sample(pipe), sample(on_cpu))
    assert done == ["before"]


def test_load_in_a_stream_of_another_gpu_is_refused(driver: Driver, load: Callable[..., Pipeline]) -> None:
    driver.count = 2
    with pytest.raises(UsageError, match=r"^stream: expected a CUDA stream of cuda:0, found one of cuda:1"):
        load(stream=driver.stream(1))


def test_load_of_int8_graphs_warns_that_they_are_slow(
    sessions: Sessions, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(tiny_bundle)
    quantized: Any = SimpleNamespace(type="int8")
    manifest = replace(bundle.manifest, precision="fp16")
    object.__setattr__(manifest, "quantization", quantized)
    sg_runtime.backends.choice.open_backend(Bundle(bundle.path, manifest, bundle.checked), backend="onnxruntime-cuda")
    assert [message for message in caplog.messages if "graphs are slower than FP16" in message]
    caplog.clear()
    sg_runtime.backends.choice.open_backend(bundle, backend="onnxruntime-cuda")
    assert caplog.messages == []


# Weights.


def test_weights_are_on_the_device_once(pipe: Pipeline, sessions: Sessions, driver: Driver) -> None:
    """Every session gets the same addresses. They hold what the file holds."""
    size = (pipe.bundle.root / "graphs/weights.bin").stat().st_size
    assert driver.used == size
    sample(pipe)
    sample(pipe, guidance=pipe.guidance("none"))
    assert len(sessions.opened) == 3
    content = np.fromfile(pipe.bundle.root / "graphs/weights.bin", np.uint8)
    (start,) = (address for address, memory in driver.live.items() if len(memory) == size)
    for path, _, shared in sessions.opened:
        assert {weight.name: start + weight.offset for weight in weights_of(path)} == {
            name: value.data_ptr() for name, value in shared.items()
        }
        assert {value.device_name() for value in shared.values()} == {"cuda"}
    np.testing.assert_array_equal(driver.live[start], content)


def test_load_of_weights_that_do_not_fit_says_what_they_need(driver: Driver, load: Callable[..., Pipeline]) -> None:
    driver.total = 100_000
    with pytest.raises(DeviceMemoryError, match=r"^cuda:0: an allocation needs \d MB, found 0 MB free") as caught:
        load()
    assert caught.value.exit_code == 6


def test_weights_of_a_graph_are_those_that_onnx_reads(tiny_bundle: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    for path in tiny_bundle.glob("graphs/*.onnx"):
        expected = {
            name: (tuple(value.shape), value.const_value.numpy())
            for name, value in ir.load(path).graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        found = {weight.name: weight for weight in weights_of(path)}
        assert found.keys() == expected.keys()
        assert found
        for name, (shape, values) in expected.items():
            weight = found[name]
            assert (weight.shape, weight.dtype) == (shape, values.dtype)
            read = np.fromfile(weight.file, weight.dtype, values.size, offset=weight.offset)
            np.testing.assert_array_equal(read.reshape(shape), values)


def test_session_of_shared_weights_reads_them_and_not_the_file(tiny_bundle: Path) -> None:
    """Here ONNX Runtime itself takes them, in the memory of the CPU."""
    path = tiny_bundle / "graphs/condition.onnx"
    feeds = {"t": np.linspace(0, 1, 2, dtype=np.float32), "class": np.zeros(2, np.int64)}
    (expected,) = sg_runtime.backends.ort.open_session(path).run(None, feeds)
    for factor in (1, 2):
        weights = DeviceWeights(HostMemory(), [path])
        for content in weights._files.values():
            content.view(np.float32)[...] *= factor
        session = sg_runtime.backends.ort.open_session(path, shared=weights.values(path))
        assert np.array_equal(session.run(None, feeds)[0], expected) == (factor == 1)


def test_warmup_before_any_run_warns_of_nothing(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe.warmup(1, steps=1)
    assert caplog.messages == []
