"""Lanes shared by threads, and the memory that runs need."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime.backends import Backend, CallSequence, Lane, open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import HostMemory
from sg_runtime.errors import DeviceError, DeviceMemoryError, UsageError
from sg_runtime.manifest import Manifest, SamplerName, read_manifest
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.budget import fitting, run_bytes
from sg_runtime.run.lanes import WORKSPACES, LanePool, LaneState

Array = NDArray[np.float32]
SAMPLERS: tuple[SamplerName, ...] = ("euler", "heun")
PATIENCE = 60
"""Seconds after which a waiting thread is considered stuck."""


@dataclass
class Turns:
    """A backend that records how many of its lanes are in use at the same time."""

    backend: Backend
    lanes: int | None = None
    name: str = "onnxruntime-cpu"
    batches: tuple[int, ...] | None = None
    memory: HostMemory = field(default_factory=HostMemory)
    made: int = 0
    together: int = 0
    """Largest number of lanes that ran at the same time."""
    shared: int = 0
    """Number of times that two threads were in one lane."""

    def __post_init__(self) -> None:
        self._lock, self._busy = threading.Lock(), 0

    def lane(self) -> Lane:
        with self._lock:
            self.made += 1
        inner = self.backend.lane()
        inner.memory = self.memory
        own = threading.Lock()

        class Noted(CallSequence):
            def play(sequence, done: Callable[[int], None]) -> None:  # noqa: N805
                with self._lock:
                    self.shared += own.locked()
                    self._busy += 1
                    self.together = max(self.together, self._busy)
                with own:
                    super().play(done)
                with self._lock:
                    self._busy -= 1

        inner.sequence = Noted  # type: ignore[method-assign]
        return inner

    def keep(self) -> None:
        pass


@pytest.fixture
def turns(tiny_bundle: Path) -> Turns:
    return Turns(open_backend(Bundle.open(tiny_bundle), "cpu"))


@pytest.fixture
def pipe(tiny_bundle: Path, turns: Turns) -> Pipeline:
    """Return a pipeline with up to three images per engine run."""
    return Pipeline(Bundle.open(tiny_bundle), turns, 3)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle / "manifest.json")


# Threads


def some_run(pipe: Pipeline, number: int) -> Array:
    """Sample one of many runs.

    They differ in classes, number of images, steps, sampler and guidance.
    """
    images = 1 + number % 4
    guidance = pipe.guidance(("none", "cfg", "sg")[number % 3])
    classes = [(number + image) % 5 for image in range(images)]
    sampler = SAMPLERS[number % 2]
    return pipe.sample(classes, range(images), steps=1 + number % 5, sampler=sampler, guidance=guidance)


@pytest.mark.parametrize("lanes", [None, 1])
def test_lease_by_many_threads_gives_each_a_lane_of_its_own(
    pipe: Pipeline, turns: Turns, lanes: int | None, tiny_bundle: Path
) -> None:
    """If the backend has only one lane, the threads take turns.

    The samples equal those of one thread, bit for bit.
    """
    turns.lanes = lanes
    shared = Pipeline(pipe.bundle, turns, 3)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: some_run(shared, number), range(64)))
    assert turns.shared == 0
    if lanes is None:
        assert 2 <= turns.together <= turns.made <= 8
    else:
        assert (turns.together, turns.made) == (1, 1)
    alone = Pipeline.load(tiny_bundle, "cpu", batch=3)
    for number, samples in enumerate(found):
        np.testing.assert_array_equal(samples, some_run(alone, number))


def test_lease_one_after_the_other_takes_the_same_lane(pipe: Pipeline, turns: Turns) -> None:
    for number in range(6):
        some_run(pipe, number)
    assert turns.made == 1


def test_lease_within_a_lease_is_another_lane(manifest: Manifest, turns: Turns) -> None:
    """This also holds for idle lanes."""
    pool = LanePool(manifest, turns)
    for _ in range(3):
        with pool.lease() as outer, pool.lease() as inner:
            assert outer is not inner
            assert outer.lane is not inner.lane
    assert turns.made == 2


def test_lease_of_two_pools_keeps_to_the_maximum_of_the_backend(manifest: Manifest, turns: Turns) -> None:
    """The pools are of two sizes of a bundle."""
    turns.lanes = 1
    first = LanePool(manifest, turns)
    second = LanePool(manifest, turns, first)
    leased = threading.Event()

    def lease() -> None:
        with second.lease():
            leased.set()

    other = threading.Thread(target=lease, daemon=True)
    with first.lease():
        other.start()
        assert not leased.wait(0.1)
    assert leased.wait(PATIENCE)
    other.join(PATIENCE)


# Errors


@pytest.mark.parametrize("lanes", [None, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_lease_after_an_error_goes_on_as_before(
    tiny_bundle: Path, turns: Turns, lanes: int | None, error: type[BaseException]
) -> None:
    """The next run is in another thread.

    It would wait forever if the lane had not been returned.
    """
    turns.lanes = lanes
    pipe = Pipeline(Bundle.open(tiny_bundle), turns, 3)
    before = pipe.sample([1, 2], [3, 4], steps=3)

    def fail(done: int, total: int) -> None:
        if done == 2:
            raise error("the caller's own")

    with pytest.raises(error, match="the caller's own"):
        pipe.sample([0, 0], [0, 0], steps=3, progress=fail)
    with ThreadPoolExecutor(1) as pool:
        after = pool.submit(pipe.sample, [1, 2], [3, 4], steps=3).result(PATIENCE)
    np.testing.assert_array_equal(after, before)
    assert turns.made == 1


class FullMemory(HostMemory):
    """Memory without room for a run's conditioning.

    This happens if others allocate memory after the budget check.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.full, self._width = True, manifest.model.held["modulations"][0]

    def empty(self, shape: Any, dtype: Any) -> NDArray[Any]:
        if self.full and tuple(shape[1:]) == (self._width,):
            raise DeviceMemoryError("cpu: 1 MB do not fit into 0")
        return super().empty(shape, dtype)


def test_lease_after_a_lack_of_memory_goes_on_as_before(
    pipe: Pipeline, turns: Turns, manifest: Manifest, tiny_bundle: Path
) -> None:
    memory = turns.memory = FullMemory(manifest)
    asked: dict[str, Any] = {"classes": [0, 1, 2], "seeds": [0, 1, 2], "steps": 3}
    with pytest.raises(DeviceMemoryError) as caught:
        pipe.sample(**asked)
    assert str(caught.value) == (
        "cpu: 1 MB do not fit into 0; runs of 3 images do not fit here: try Pipeline.load(…, batch=1)"
    )
    memory.full = False
    np.testing.assert_array_equal(pipe.sample(**asked), Pipeline.load(tiny_bundle, "cpu").sample(**asked))


class LostMemory(HostMemory):
    """Memory of a device that is lost when the test says so."""

    def __init__(self) -> None:
        self.lost = False

    def wait(self) -> None:
        if self.lost:
            raise DeviceError("the CUDA driver: cuStreamSynchronize gave CUDA_ERROR_ILLEGAL_ADDRESS")


def test_lease_of_a_device_that_is_lost_says_so_from_then_on(pipe: Pipeline, turns: Turns) -> None:
    """This holds even if the device answers again, because its contents are lost."""
    memory = turns.memory = LostMemory()
    pipe.sample([0], [0], steps=1)

    def lose(done: int, total: int) -> None:
        memory.lost = True
        raise ValueError("what the run saw of it")

    with pytest.raises(DeviceError) as caught:
        pipe.sample([0], [0], steps=1, progress=lose)
    expected = (
        "cpu: the device was lost and this pipeline with it: start the process again (the CUDA driver: "
        "cuStreamSynchronize gave CUDA_ERROR_ILLEGAL_ADDRESS; the error before it: what the run saw of it)"
    )
    assert str(caught.value) == expected
    assert isinstance(caught.value.__cause__, ValueError)
    memory.lost = False
    x = pipe.initial_noise([0])
    calls: list[Callable[[], object]] = [
        lambda: pipe.sample([0], [0], steps=1),
        lambda: pipe.prepare([1.0], [0], [0]),
        lambda: pipe.guided(x, pipe.prepare_once(0.5, [0])),
        pipe.warmup,
    ]
    for call in calls * 2:
        with pytest.raises(DeviceError) as again:
            call()
        assert str(again.value) == expected


def test_lease_of_a_device_that_lives_keeps_the_error(pipe: Pipeline, turns: Turns) -> None:
    turns.memory = LostMemory()
    with pytest.raises(UsageError, match=r"^branches: expected"):
        pipe.branches(pipe.initial_noise([0]), pipe.prepare_once(0.5, [0], guidance=pipe.guidance("none")))
    assert pipe.sample([0], [0], steps=1).shape == (1, 2, 8, 8)


# Workspaces


def test_workspace_of_the_same_sizes_is_the_same_as_long_as_it_is_kept(manifest: Manifest, turns: Turns) -> None:
    """Only the last workspaces are kept."""
    worker = LaneState(manifest, turns.lane(), None)
    first, second = worker.workspace(1, 3, False), worker.workspace(2, 3, False)
    assert first is not second
    assert worker.workspace(1, 3, False) is first
    assert worker.workspace(2, 3, True) not in (first, second)
    assert worker.workspace(1, 3, False) is first
    assert worker.workspace(2, 3, False) is not second


def test_workspace_of_many_sizes_holds_no_more_than_a_few(
    watch: Callable[[Path], Any], tiny_bundle: Path, manifest: Manifest
) -> None:
    backend = watch(tiny_bundle)
    worker = LaneState(manifest, backend.lane(), None)
    sizes = [(batch, evaluations, True) for batch in range(1, 5) for evaluations in (9, 2)]
    for size in sizes:
        worker.workspace(*size)
    assert 0 < backend.memory.live <= sum(run_bytes(manifest, *size) for size in sizes[-WORKSPACES:])
    worker.release()
    assert backend.memory.live == 0


class SmallMemory(HostMemory):
    """Memory of a device with `free` bytes free; None if the device cannot report it."""

    def __init__(self, free: int | None) -> None:
        self.free = free

    def free_bytes(self) -> int | None:
        return self.free


def test_workspace_of_a_memory_that_cannot_tell_is_tried(manifest: Manifest, turns: Turns) -> None:
    turns.memory = SmallMemory(None)
    assert LaneState(manifest, turns.lane(), None).workspace(3, 4, False) is not None


def test_workspace_where_others_are_in_the_way_takes_their_place(
    watch: Callable[[Path], Any], tiny_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = watch(tiny_bundle)
    total = run_bytes(manifest, 3, 5, False)
    monkeypatch.setattr(backend.memory, "free_bytes", lambda: total - backend.memory.live)
    worker = LaneState(manifest, backend.lane(), None)
    for evaluations in (4, 5):
        worker.workspace(3, evaluations, False)
    before = backend.memory.live
    assert worker.workspace(3, 5, False) is not None
    assert backend.memory.live == before < total


def test_workspace_of_ten_million_images_names_what_would_fit(manifest: Manifest, turns: Turns) -> None:
    """The free memory is that of this machine.

    The sizes that the message names pass the same check.
    """
    worker = LaneState(manifest, turns.lane(), None)
    with pytest.raises(DeviceMemoryError) as caught:
        worker.workspace(10**7, 40, False)
    found = re.fullmatch(
        r"cpu: runs of 10000000 images with the conditioning of 40 evaluations at a time need ([\d,]+) MB, found "
        r"([\d,]+) MB free; Pipeline\.load\(…, batch=(\d+), chunk=1\) would fit",
        str(caught.value),
    )
    assert found is not None
    needed, free, batch = (int(number.replace(",", "")) for number in found.groups())
    assert needed == round(run_bytes(manifest, 10**7, 40, False) / 1e6)
    assert needed > free
    turns.memory = SmallMemory((free + 1) * 10**6)  # the message rounds to MB
    assert LaneState(manifest, turns.lane(), None).workspace(batch, 1, False) is not None


def test_sample_of_more_than_the_memory_holds_is_refused_before_its_noise_is_drawn(
    pipe: Pipeline, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing noise takes minutes, even for a run that cannot start."""
    drawn: list[int] = []
    monkeypatch.setattr("sg_runtime.run.sample.philox.normal", lambda *_, **__: drawn.append(1) or np.zeros((2, 8, 8)))
    turns.memory = SmallMemory(10**4)
    with pytest.raises(DeviceMemoryError, match=r"found 0 MB free; not even one image fits: free some memory"):
        pipe.sample([0, 1, 2], [0, 1, 2], steps=3)
    assert not drawn


@given(batch=st.integers(1, 500), evaluations=st.integers(1, 500), separate=st.booleans(), share=st.floats(0, 1))
def test_fitting_of_any_request_names_the_largest_that_fits(
    batch: int, evaluations: int, separate: bool, share: float, manifest: Manifest
) -> None:
    free = int(share * (run_bytes(manifest, batch, evaluations, separate) - 1))
    text = fitting(manifest, None, batch, evaluations, separate, free)
    if (found := re.fullmatch(r"Pipeline\.load\(…, chunk=(\d+)\) would fit", text)) is not None:
        images, chunk, more = batch, int(found[1]), (0, 1)
        assert 1 <= chunk < evaluations
    elif (found := re.fullmatch(r"Pipeline\.load\(…, batch=(\d+), chunk=1\) would fit", text)) is not None:
        images, chunk, more = int(found[1]), 1, (1, 0)
        assert 1 <= images < batch
    else:
        assert text == "not even one image fits: free some memory"
        images, chunk, more = 0, 1, (1, 0)
    assert images == 0 or run_bytes(manifest, images, chunk, separate) <= free
    assert run_bytes(manifest, images + more[0], chunk + more[1], separate) > free


def test_sample_with_what_was_named_fits(tiny_bundle: Path, turns: Turns) -> None:
    """The samples equal those of a run with enough memory."""
    bundle = Bundle.open(tiny_bundle)
    turns.memory = SmallMemory(run_bytes(bundle.manifest, 3, 3, False) - 1)
    asked: dict[str, Any] = {"classes": [0, 1, 2], "seeds": [0, 1, 2], "steps": 3}
    with pytest.raises(DeviceMemoryError, match=r"Pipeline\.load\(…, chunk=2\) would fit"):
        Pipeline(bundle, turns, 3).sample(**asked)
    found = Pipeline(bundle, turns, 3, chunk=2).sample(**asked)
    np.testing.assert_array_equal(found, Pipeline.load(tiny_bundle, "cpu").sample(**asked))


@pytest.mark.parametrize("free_images", [2, 1])
def test_workspace_of_graphs_for_one_count_of_images_names_no_other(tiny_cfg_sg_bundle: Path, free_images: int) -> None:
    """`Pipeline.load` would refuse another batch: these graphs take exactly three images."""
    bundle = Bundle.open(tiny_cfg_sg_bundle)
    backend = Turns(open_backend(bundle, "cpu"), batches=(3,))
    backend.memory = SmallMemory(run_bytes(bundle.manifest, free_images, 1, True))
    with pytest.raises(DeviceMemoryError) as caught:
        Pipeline(bundle, backend, 3).sample([0, 1, 2], [0, 1, 2], steps=3)
    assert "batch=" not in str(caught.value)
