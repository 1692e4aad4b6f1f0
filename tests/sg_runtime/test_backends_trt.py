"""The TensorRT backend, run with stand-ins for the library and the driver.

The stand-ins run, on the CPU, the graphs from which a bundle's engines were built. The engine files
are real. Other tests check that the real library has every name that the backend uses.
"""

import gc
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as real
import trt_api
from cuda_stand_in import CUresult, Driver
from numpy.typing import NDArray
from prx_folders import CONFIG, state_of, write_pipeline
from trt_stand_in import Library, RuntimeCache

import sg_runtime.backends.trt
from sg_export.checkpoint import Overrides
from sg_export.options.engines import EngineOptions
from sg_runtime.backends import open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import examples
from sg_runtime.devices import dlpack
from sg_runtime.devices.cuda import CudaArray
from sg_runtime.errors import BundleError, DeviceError, DeviceMemoryError, EngineError
from sg_runtime.manifest import EngineFacts, Route
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import Churn

CLASSES, SEEDS, STEPS = [0, 1, 2, 3, None], [5, 6, 7, 8, 9], 3


@pytest.fixture(scope="session")
def trt_bundle(build_once: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """Return FP32 TensorRT-RTX engines of the tiny model and their graphs.

    They are built for SG at 0 and 0.5, for 1 and 2 images.
    """
    options = {"sparsity": (0.5,), "engines": EngineOptions(batch=(1, 2), keep_onnx=True)}
    return build_once("trt-bundle", tiny_checkpoint, **options)


@pytest.fixture(scope="session")
def edm_bundle(trt_bundle: Path) -> Path:
    """Return the same bundle as a denoiser (edm): only scalars and times differ."""
    copy = trt_bundle.with_name("trt-edm")
    shutil.copytree(trt_bundle, copy)
    content = json.loads((copy / "manifest.json").read_text())
    content["model"]["prediction"] = "edm"
    content["sampling"]["times"] = {"sigma_min": 0.02, "sigma_max": 3.0, "rho": 7.0}
    (copy / "manifest.json").write_text(json.dumps(content))
    return copy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of compiled kernels.

    Each test has its own, because backends read it again.
    """
    monkeypatch.setenv("SG_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tensorrt-rtx"


@pytest.fixture
def library(trt_bundle: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Replace TensorRT-RTX by a stand-in and return it."""
    stand_in = Library(Bundle.open(trt_bundle), driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)
    return stand_in


@pytest.fixture
def pipe(library: Library) -> Pipeline:
    """Return a pipeline with up to two images per engine run."""
    return Pipeline.load(library.bundle.path)


def sample(pipe: Pipeline, images: int = 5, **how: Any) -> NDArray[np.float32]:
    found: NDArray[np.float32] = pipe.sample(CLASSES[:images], SEEDS[:images], **{"steps": STEPS, **how})
    return found


def on_cpu(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle, backend="onnxruntime-cpu", batch=2)


def close(found: Any, expected: NDArray[np.float32]) -> None:
    """Assert that two results agree up to the order of FP32 sums.

    Both come from ONNX Runtime on the CPU and use the same values at other addresses.
    """
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# Samples.


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_sample_equals_that_of_the_cpu_in_every_run(
    library: Library, pipe: Pipeline, images: int, sampler: str
) -> None:
    """The first run launches each kernel, the second is captured, the third is replayed."""
    assert pipe.backend.name == "tensorrt-rtx"
    assert (pipe.batch, pipe.backend.batches) == (2, (1, 2))
    expected = sample(on_cpu(library.bundle.path), images, sampler=sampler)
    assert expected.std() > 0.1
    for _ in range(3):
        close(sample(pipe, images, sampler=sampler), expected)


@pytest.mark.parametrize("chunk", [1, 2])
def test_sample_of_chunks_equals_that_of_the_cpu(library: Library, chunk: int) -> None:
    """All chunks read the same tables, which are refilled for each chunk."""
    pipe = Pipeline.load(library.bundle.path, chunk=chunk)
    expected = sample(on_cpu(library.bundle.path))
    for _ in range(3):
        close(sample(pipe), expected)


@pytest.mark.parametrize("churn", [None, Churn(1.0), Churn(1.0, low=0.1, high=1.0)], ids=["none", "all", "some"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_sample_of_an_edm_model_equals_that_of_the_cpu(
    edm_bundle: Path, library: Library, sampler: str, churn: Churn | None
) -> None:
    pipe = Pipeline.load(edm_bundle)
    expected = sample(on_cpu(edm_bundle), sampler=sampler, churn=churn)
    for _ in range(3):
        close(sample(pipe, sampler=sampler, churn=churn), expected)


def test_sample_by_tensorrt_equals_that_of_the_cpu(
    trt_bundle: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """TensorRT creates contexts from a strategy, and it has no kernel cache."""
    bundle = Bundle.open(trt_bundle)
    engines = tuple(replace(engine, library="tensorrt") for engine in bundle.manifest.engines)
    bundle = Bundle(trt_bundle, replace(bundle.manifest, engines=engines))
    library = Library(bundle, driver, "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    backend = open_backend(bundle)
    pipe = Pipeline(bundle, backend, 2)
    assert backend.name == "tensorrt"
    expected = sample(on_cpu(trt_bundle))
    for _ in range(3):
        close(sample(pipe), expected)
    pipe.warmup()
    assert not cache.exists()


def test_sample_in_a_given_stream_uses_no_other(library: Library, driver: Driver) -> None:
    """Two threads take turns in that stream."""
    given = driver.stream()
    pipe = Pipeline.load(library.bundle.path, stream=given)
    expected = sample(on_cpu(library.bundle.path))
    for found in in_threads(2, lambda _: sample(pipe)):
        close(found, expected)
    assert pipe.backend.lanes == 1
    assert {stream for context in library.contexts for stream in context.streams} == {given}
    assert "cuStreamCreate" not in driver.calls


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of `work(i)` from `count` threads that run at the same time."""
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: work(i)}), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[i] for i in range(count)]


@pytest.mark.parametrize("default", [0, 1, 2])
def test_sample_in_a_default_stream_is_captured_in_another(library: Library, driver: Driver, default: int) -> None:
    """The driver cannot capture a default stream, and ONNX Runtime does not run in one."""
    pipe = Pipeline.load(library.bundle.path, stream=default)
    expected = sample(on_cpu(library.bundle.path))
    for _ in range(3):
        close(sample(pipe), expected)
    assert "cuGraphLaunch" in driver.calls
    assert default not in {stream for context in library.contexts for stream in context.streams}


def test_sample_on_the_device_is_an_array_there(driver: Driver, pipe: Pipeline) -> None:
    expected = sample(pipe)
    found = pipe.sample_on_device(CLASSES, SEEDS, steps=STEPS)
    assert isinstance(found, CudaArray)
    sample(pipe)  # no later run writes into it
    content = driver.place(found.address, found.nbytes).view(np.float32).reshape(found.shape)
    np.testing.assert_array_equal(content, expected)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_guided_of_an_array_on_the_device_stays_there(
    library: Library, driver: Driver, pipe: Pipeline, images: int
) -> None:
    """The input is like a PyTorch tensor; nobody reads the graph's other output."""
    x = on_cpu(library.bundle.path).initial_noise(SEEDS[:images])
    expected = on_cpu(library.bundle.path).guided(x, on_cpu(library.bundle.path).prepare_once(0.5, CLASSES[:images]))
    close(pipe.guided(x, pipe.prepare_once(0.5, CLASSES[:images])), expected)
    with pipe._opened.step(pipe.bundle)[1].lease() as worker:
        held = worker.lane.memory.hold(x)
        worker.lane.memory.wait()

    class Tensor:
        def __dlpack__(self, **_: Any) -> object:
            return held.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return dlpack.CUDA, 0

    found: Any = pipe.guided(Tensor(), pipe.prepare_once(0.5, CLASSES[:images]))  # type: ignore[call-overload]
    assert isinstance(found, CudaArray)
    close(driver.place(found.address, found.nbytes).view(np.float32).reshape(found.shape), expected)


def test_sample_without_capture_asks_for_each_run(library: Library, driver: Driver) -> None:
    pipe = Pipeline.load(library.bundle.path, capture=False)
    expected = sample(on_cpu(library.bundle.path))
    for _ in range(3):
        close(sample(pipe), expected)
    assert "cuStreamBeginCapture" not in driver.calls


def test_plan_that_one_lane_prepared_is_there_for_another(library: Library, pipe: Pipeline) -> None:
    """Each lane has its own stream, and no stream waits for the other."""
    reference = on_cpu(library.bundle.path)
    x, times = reference.initial_noise(SEEDS), [1.0, 0.5]
    expected = reference.guided(x, reference.prepare(times, CLASSES, SEEDS), 1)
    plan = pipe.prepare(times, CLASSES, SEEDS)
    with pipe._opened.step(pipe.bundle)[1].lease():
        close(pipe.guided(x, plan, 1), expected)
    assert len({stream for context in library.contexts for stream in context.streams}) == 2


# Sizes.


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True], ids=["own streams", "one stream"])
def test_at_opens_the_engines_of_a_size_when_it_is_asked_for(
    given: bool,
    driver: Driver,
    once: Callable[..., Path],
    build_once: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engines of two sizes with equal numbers of tokens. They stay open."""
    config = replace(CONFIG, depth=1)
    folder = once("prx-trt", lambda path: write_pipeline(path, config, state_of(config)))
    overrides = Overrides(Route(0, 0), size=(64, 256), text_tokens=3)
    options = {"sparsity": (0.5,), "overrides": overrides, "sizes": ((256, 64),)}
    bundle = Bundle.open(build_once("prx-trt-bundle", folder, engines=EngineOptions(keep_onnx=True), **options))
    library = Library(bundle, driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    stream = driver.stream() if given else None
    pipe, reference = Pipeline.load(bundle, stream=stream), Pipeline.load(bundle, backend="onnxruntime-cpu")
    assert pipe.backend.name == "tensorrt-rtx"
    assert len(library.engines) == 3
    conditions, seeds = examples(bundle.manifest.model, 2), [0, 1]
    for size in ((256, 64), (64, 256), (256, 64)):
        expected = reference.at(*size).sample(conditions, seeds, steps=STEPS)
        for found in in_threads(2, lambda _, size=size: pipe.at(*size).sample(conditions, seeds, steps=STEPS)):
            close(found, expected)
        assert len(library.engines) == 6, "the first size has condition, prompt and a guided engine, the other its own"
    if given:
        assert {used for context in library.contexts for used in context.streams} == {stream}


# Calls of the device.


def part(driver: Driver, work: Callable[[], object]) -> list[str]:
    """Return the driver calls that `work` makes."""
    before = len(driver.calls)
    work()
    return driver.calls[before:]


def test_sample_asks_for_all_steps_without_waiting(driver: Driver, pipe: Pipeline) -> None:
    """The steps are enqueued without a wait between them.

    The first run enqueues each step, the second captures all steps, the third launches their graph.
    """
    sample(pipe, 2, steps=8)  # compiles, allocates and binds everything
    pipe.release()
    first, second, third = (part(driver, lambda: sample(pipe, 2, steps=8)) for _ in range(3))
    steps = ["execute_async_v3"] * 8
    capture = ["cuStreamBeginCapture", *steps, "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy"]
    for calls, expected in ((first, steps), (second, [*capture, "cuGraphLaunch"]), (third, ["cuGraphLaunch"])):
        end = len(calls) - calls[::-1].index(expected[-1])
        assert calls[end - len(expected) : end] == expected
        assert calls.count("cuStreamSynchronize") == 1  # for the samples
        assert "cuStreamSynchronize" not in calls[:end]
    assert third.count("execute_async_v3") < second.count("execute_async_v3")  # only the conditioning
    assert not {"cuStreamBeginCapture", "cuGraphInstantiate"} & {*first, *third}
    assert third.count("cuGraphLaunch") == 1


def test_play_of_nothing_asks_for_nothing(driver: Driver, pipe: Pipeline) -> None:
    """This is the part before the first step of a run that begins with noise."""
    lane = pipe.backend.lane()
    nothing = lane.sequence(())
    assert not part(driver, lambda: [nothing.play(lambda _: None) for _ in range(3)])


def test_progress_of_each_run_counts_all_evaluations(pipe: Pipeline) -> None:
    for _ in range(3):
        told: list[tuple[int, int]] = []
        sample(pipe, 5, sampler="heun", progress=lambda done, total, told=told: told.append((done, total)))
        assert told == [(done, 15) for done in range(1, 16)]


def test_lane_has_a_context_for_each_profile_over_one_scratch(library: Library, driver: Driver, pipe: Pipeline) -> None:
    for images in (2, 1, 5, 2, 1):
        sample(pipe, images)
    kinds = sorted((context.engine.facts.kind, context.profile) for context in library.contexts)
    assert kinds == [("condition", 0), ("guided", 0), ("guided", 1)]
    ((address, size),) = {context.scratch for context in library.contexts}
    assert size == max(engine.device_memory_size_v2 for engine in library.engines)
    assert len(driver.place(address, size)) == size


def test_lanes_of_threads_share_the_engines_alone(library: Library, driver: Driver, pipe: Pipeline) -> None:
    """All threads work at the same time: each waits in its first step for the others."""
    together = threading.Barrier(3, timeout=60)

    def work(number: int) -> NDArray[np.float32]:
        """Sample with other step counts in each thread, so that no barrier waits forever."""
        first = [together.wait]
        return sample(pipe, 2, steps=2 + number, progress=lambda *_: first.pop()() if first else None)

    found = in_threads(3, work)
    for number, samples in enumerate(found):
        close(samples, sample(on_cpu(library.bundle.path), 2, steps=2 + number))
    assert len(library.engines) == len(library.bundle.manifest.engines)
    for engine in library.engines:
        assert len(engine.contexts) == 3
        assert len({context.scratch for context in engine.contexts}) == 3
        assert all(len(context.streams) == 1 for context in engine.contexts)
    assert len({stream for context in library.contexts for stream in context.streams}) == 3
    assert driver.calls.count("cuStreamCreate") == 3


@pytest.mark.slow
def test_memory_of_runs_that_are_over_is_given_back(driver: Driver, pipe: Pipeline) -> None:
    """A lane keeps the buffers of two kinds of runs, however many runs there were.

    Captured runs make no difference.
    """
    used = []
    for steps in (2, 3, 4, 5, 6, 4, 5, 6):
        sample(pipe, 2, steps=steps)
        sample(pipe, 2, steps=steps)
        gc.collect()
        used.append(driver.used)
    assert used[-2:] == used[3:5]  # the runs of 4 and 5 steps, and of 5 and 6 steps


def test_forget_gives_all_buffers_back(driver: Driver, pipe: Pipeline) -> None:
    with pipe._opened.step(pipe.bundle)[1].lease():
        pass
    idle = driver.used  # the scratch
    for _ in range(3):
        sample(pipe, 2)
    pipe.release()
    gc.collect()
    unread = 2 * 2 * 8 * 8 * 4  # upper limit of the output that nobody reads
    assert driver.used <= idle + unread
    assert not driver.executables


def test_pipeline_that_is_dropped_leaves_nothing(driver: Driver, library: Library) -> None:
    pipe = Pipeline.load(library.bundle.path)
    for _ in range(3):
        sample(pipe)
    del pipe
    library.engines.clear()
    gc.collect()
    assert driver.used == 0
    assert not driver.executables
    assert not driver.graphs


# Engines and kernels.


def caches(library: Library) -> list[RuntimeCache]:
    """Return the runtime caches of all contexts."""
    return [context.config.cache for context in library.contexts if context.config and context.config.cache]


def test_warmup_writes_the_kernels_and_the_next_backend_reads_them(
    library: Library, pipe: Pipeline, cache: Path
) -> None:
    manifest = library.bundle.manifest
    before = {path: path.stat().st_mtime_ns for path in library.bundle.path.rglob("*")}
    pipe.warmup(steps=2)
    written = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert written.keys() == {f"{manifest.files[engine.file].sha256}.cache" for engine in manifest.engines}
    assert sorted(written.values()) == [b"kernels:condition/0", b"kernels:guided-16-8/0"]
    assert {path: path.stat().st_mtime_ns for path in library.bundle.path.rglob("*")} == before
    library.engines.clear()
    again = Pipeline.load(library.bundle.path)
    sample(again, 5)
    assert sorted(found.read or b"" for found in caches(library)) == sorted(written.values())
    assert not [path for path in cache.iterdir() if path.suffix != ".cache"]


@pytest.mark.parametrize("how", ["sample", "guided"])
def test_kernels_of_a_later_run_are_kept_too(library: Library, pipe: Pipeline, cache: Path, how: str) -> None:
    sample(pipe, 1)
    assert {path.read_bytes() for path in cache.iterdir()} == {b"kernels:condition/0", b"kernels:guided-16-8/0"}
    if how == "sample":
        sample(pipe, 2)
    else:
        pipe.guided(np.zeros((2, 2, 8, 8), np.float32), pipe.prepare_once(0.5, [0, 1]))
    assert b"kernels:guided-16-8/0,guided-16-8/1" in {path.read_bytes() for path in cache.iterdir()}


def test_kernels_are_written_after_runs_that_compiled_some_and_no_others(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    serialize = RuntimeCache.serialize
    monkeypatch.setattr(RuntimeCache, "serialize", lambda cache: asked.append(cache) or serialize(cache))
    counts = []
    for images in (1, 1, 2, 1, 2):
        sample(pipe, images)
        counts.append(len(asked))
    assert counts == [2, 2, 3, 3, 3]  # conditioning and guided step; then its second profile


def test_kernels_for_the_shapes_are_compiled_before_a_capture(library: Library, pipe: Pipeline) -> None:
    """The default compiles them in the background, while a capture takes slower kernels."""
    sample(pipe, 2)
    eager = real.DynamicShapesKernelSpecializationStrategy.EAGER
    strategies = [context.config.dynamic_shapes_kernel_specialization_strategy for context in library.contexts]
    assert strategies == [eager] * 2


def test_kernels_of_another_gpu_are_compiled_anew(
    library: Library, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    manifest = library.bundle.manifest
    files = [cache / f"{manifest.files[engine.file].sha256}.cache" for engine in manifest.engines]
    for file in files:
        file.write_bytes(b"of another GPU")
    with caplog.at_level(logging.INFO, "sg_runtime"):
        pipe = Pipeline.load(library.bundle.path)
    for file in files:
        assert f"{file}: made for another driver or GPU; kernels are compiled again" in caplog.messages
    pipe.warmup(steps=2)
    assert all(file.read_bytes().startswith(RuntimeCache.KIND) for file in files)


@pytest.mark.parametrize("fault", ["no folder", "folders in place of files"])
def test_cache_that_cannot_be_used_ends_no_run(library: Library, cache: Path, fault: str) -> None:
    """Permissions are not tested, because root may read and write everything."""
    if fault == "no folder":
        cache.parent.write_bytes(b"a file in place of the folder")
    else:
        manifest = library.bundle.manifest
        for engine in manifest.engines:
            (cache / f"{manifest.files[engine.file].sha256}.cache" / "inside").mkdir(parents=True)
    pipe = Pipeline.load(library.bundle.path)
    pipe.warmup(steps=2)
    close(sample(pipe), sample(on_cpu(library.bundle.path)))


def test_engine_that_does_not_deserialise_names_it_and_the_build(library: Library) -> None:
    library.refuses.add("deserialize")
    path, engine = library.bundle.path, library.bundle.manifest.engines[0]
    with pytest.raises(EngineError) as caught:
        Pipeline.load(path)
    assert str(caught.value).startswith(
        f"{path}: {engine.file}: TensorRT-RTX cannot open it; see its log messages, then build it again: sg-export "
    )


def test_context_that_is_not_made_names_engine_and_profile(library: Library, pipe: Pipeline) -> None:
    library.refuses.add("context")
    with pytest.raises(EngineError, match=r"^engines/condition\.\w+\.engine: TensorRT-RTX cannot create a context"):
        sample(pipe)


def test_bind_for_another_batch_names_the_build(library: Library, pipe: Pipeline) -> None:
    lane = pipe.backend.lane()
    graph = library.bundle.manifest.graph("guided", 16, 8)
    assert graph is not None
    x = lane.memory.empty((3, 2, 8, 8), np.float32)
    with pytest.raises(BundleError) as caught:
        lane.bind(graph, {"x": x}, {})
    message = str(caught.value)
    assert "guided-16-8 has no engine of TensorRT-RTX for batches of 3; build it again: sg-export build" in message
    assert "--batch 1 --batch 2 --batch 3" in message


@pytest.mark.parametrize("how", [{"fused": False}, {"guidance": "none"}], ids=["two passes", "none"])
def test_sample_by_a_graph_without_an_engine_names_it(pipe: Pipeline, how: dict[str, Any]) -> None:
    """The bundle has only the engines that its own guidance needs."""
    if "guidance" in how:
        how = {"guidance": pipe.guidance(how["guidance"])}
    with pytest.raises(BundleError, match=r": dense has no engine of TensorRT-RTX for batches of 2; "):
        sample(pipe, 2, **how)


# Faults.


@pytest.mark.parametrize(
    "fault", ["capture", "capturable", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_capture_that_fails_is_one_warning_and_the_samples_are_right(
    library: Library, driver: Driver, pipe: Pipeline, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    if fault in ("capture", "capturable"):
        library.refuses.add(fault)
    else:
        driver.statuses[fault] = CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    expected = sample(on_cpu(library.bundle.path))
    for _ in range(3):
        close(sample(pipe), expected)
    (message,) = caplog.messages
    assert message.startswith("runs are not captured as a CUDA graph, each is launched kernel by kernel: ")
    assert "cuGraphLaunch" not in driver.calls
    assert ("cuStreamBeginCapture" in driver.calls) == (fault != "capturable")


def test_execution_that_fails_is_an_error_and_the_pipeline_goes_on(library: Library, pipe: Pipeline) -> None:
    expected = sample(pipe)
    library.refuses.add("execute")
    for _ in range(2):
        with pytest.raises(EngineError, match=r"^engines/condition\.\w+\.engine: TensorRT-RTX failed; see its log"):
            sample(pipe)
    library.refuses.clear()
    for _ in range(3):
        np.testing.assert_array_equal(sample(pipe), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_device_that_is_lost_ends_the_pipeline(driver: Driver, pipe: Pipeline, when: str) -> None:
    if when == "after":
        for _ in range(3):
            sample(pipe, 2)
    driver.statuses["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceError) as caught:
        sample(pipe, 2)
    message = str(caught.value)
    assert message.startswith("cuda:0: the device was lost and this pipeline with it: start the process again (")
    assert "cuStreamSynchronize gave CUDA_ERROR_ILLEGAL_ADDRESS" in message
    driver.statuses.clear()
    driver.lost = False
    for ask in (sample, lambda pipe: pipe.guided(np.zeros((1, 2, 8, 8), np.float32), pipe.prepare_once(0.5, [0]))):
        with pytest.raises(DeviceError) as again:
            ask(pipe)
        assert str(again.value) == message


def test_sample_that_does_not_fit_says_what_would_and_the_pipeline_goes_on(driver: Driver, pipe: Pipeline) -> None:
    expected = sample(pipe, 2, steps=4)
    driver.total = driver.used + 60_000
    with pytest.raises(DeviceMemoryError, match=r"need \S+ MB, found \S+ MB free; "):
        sample(pipe, 2, steps=40)
    driver.total = 1 << 30
    for _ in range(3):
        np.testing.assert_array_equal(sample(pipe, 2, steps=4), expected)


def test_sample_that_runs_out_of_memory_at_any_time_leaves_the_pipeline_usable(
    library: Library, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each allocation of a first run fails once, whatever the driver reported as free."""
    allocate, place = driver.cuMemAlloc, library.bundle.path
    expected = sample(Pipeline.load(place), 2)
    for failing in range(part(driver, lambda: sample(Pipeline.load(place), 2)).count("cuMemAlloc")):
        pipe, count = Pipeline.load(place), iter(range(1000))

        def refuse(size: int, failing: int = failing, count: Iterator[int] = count) -> tuple[Any, ...]:
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY,) if next(count) == failing else allocate(size)

        with monkeypatch.context() as patch:
            patch.setattr(driver, "cuMemAlloc", refuse)
            with pytest.raises(DeviceMemoryError, match=r"^cuda:0: .* needs [\d,]+ MB, found 1,07\d MB free: .*MEMORY"):
                sample(pipe, 2)
        for _ in range(3):
            np.testing.assert_array_equal(sample(pipe, 2), expected)


# Names of the library.

NAMES: dict[str, tuple[str, ...]] = {
    "": ("Logger", "Runtime", "TensorIOMode", "ExecutionContextAllocationStrategy"),
    "Logger": ("ERROR",),
    "TensorIOMode": ("INPUT",),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "device_memory_size_v2",
        "create_execution_context",
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_profile_shape",
    ),
    "IExecutionContext": (
        "set_optimization_profile_async",
        "set_device_memory",
        "set_input_shape",
        "get_tensor_shape",
        "set_tensor_address",
        "execute_async_v3",
    ),
}
"""Names that the backend uses, by the class that has them; "" is the module."""

RTX_ALONE = {
    "": ("DynamicShapesKernelSpecializationStrategy", "IRuntimeCache"),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": (
        "set_execution_context_allocation_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "create_runtime_cache",
        "set_runtime_cache",
        "get_runtime_cache",
    ),
    "IRuntimeCache": ("serialize", "deserialize"),
    "IExecutionContext": ("is_stream_capturable",),
}
"""Names that the backend uses only if the module has IRuntimeCache, as TensorRT-RTX does."""

OBJECTS = {
    *("self._trt", "self._runtime", "self._engines[]", "self._configs[]"),
    *("opened", "engine", "context", "config", "cache", "strategies"),
}
"""Expressions that hold the library or one of its objects.

An `engine` may also be the engine's facts in the manifest.
"""

USES = {
    use
    for use in trt_api.uses(sg_runtime.backends.trt, OBJECTS)
    if use.name not in {field.name for field in fields(EngineFacts)}
}


def test_names_are_all_that_the_backend_uses() -> None:
    expected = {name for names in (NAMES, RTX_ALONE) for own in names.values() for name in own}
    assert {use.name for use in USES} == expected


def test_used_names_are_in_tensorrt_rtx_and_take_the_arguments() -> None:
    api = trt_api.api_of(real)
    for names in (NAMES, RTX_ALONE):
        assert not trt_api.missing(api, names)
        assert not trt_api.misfits(api, names, USES)


@pytest.mark.parametrize("version", sorted(trt_api.recorded()))
def test_used_names_are_in_tensorrt_and_take_the_arguments(version: str) -> None:
    """`tests/sg_engines/test_trt_names.py` checks the record."""
    api = trt_api.recorded()[version]
    assert not trt_api.missing(api, NAMES)
    assert not trt_api.misfits(api, NAMES, USES)
    names = {"": ("IRuntimeCache",), "IExecutionContext": ("is_stream_capturable",)}
    assert trt_api.missing(api, names) == [".IRuntimeCache", "IExecutionContext.is_stream_capturable"]


def test_stand_in_has_the_names_that_are_used(library: Library, pipe: Pipeline) -> None:
    sample(pipe, 1)
    context = library.contexts[0]
    found = {
        "": library,
        "Runtime": library.Runtime(real.Logger()),
        "ICudaEngine": context.engine,
        "IExecutionContext": context,
        "IRuntimeConfig": context.config,
        "IRuntimeCache": RuntimeCache(),
    }
    for owner, stand_in in found.items():
        for name in (*NAMES.get(owner, ()), *RTX_ALONE.get(owner, ())):
            assert hasattr(stand_in, name)
