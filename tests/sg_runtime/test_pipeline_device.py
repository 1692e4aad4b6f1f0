"""Arrays that stay on the device: DLPack inputs, samples on the device, and warm pipelines."""

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sg_runtime.backends.ort import OrtBackend, open_session
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.prepared import PreparedRun

CLASSES, SEEDS = [1, None, 3], [5, 6, 7]


@pytest.fixture
def backend(watch: Callable[[Path], Any], tiny_bundle: Path) -> Any:
    return watch(tiny_bundle)


@pytest.fixture
def pipe(tiny_bundle: Path, backend: Any) -> Pipeline:
    """Return a pipeline with up to three images per engine run."""
    return Pipeline(Bundle.open(tiny_bundle), backend, 3)


@pytest.fixture
def plan(pipe: Pipeline) -> PreparedRun:
    return pipe.prepare([0.6], CLASSES, SEEDS)


@pytest.fixture
def x(pipe: Pipeline) -> NDArray[np.float32]:
    return pipe.initial_noise(SEEDS)


# PyTorch states


@pytest.mark.parametrize("mode", ["sg", "cfg", "none"])
def test_guided_of_a_torch_tensor_reads_it_where_it_lies(
    pipe: Pipeline, backend: Any, x: NDArray[np.float32], mode: Any
) -> None:
    """Every run of a graph reads the tensor at its address.

    The prediction is returned without a copy.
    """
    plan = pipe.prepare([0.6], CLASSES, SEEDS, guidance=pipe.guidance(mode))
    expected = pipe.guided(x, plan, 0)
    tensor = torch.from_numpy(x.copy())
    backend.events.clear()
    found = pipe.guided(tensor, plan, 0)  # type: ignore[call-overload]
    runs = [event for event in backend.events if event.kind == "run"]
    assert {run.inputs["x"] for run in runs} == {tensor.data_ptr()}
    assert "download" not in backend.kinds
    back = torch.from_dlpack(found)
    assert back.data_ptr() == found.__array_interface__["data"][0]
    np.testing.assert_array_equal(back.numpy(), expected)
    np.testing.assert_array_equal(tensor.numpy(), x)


def test_guided_of_a_torch_tensor_once_is_that_of_numpy(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    found: Any = pipe.guided(torch.from_numpy(x), pipe.prepare_once(0.6, CLASSES))  # type: ignore[call-overload]
    np.testing.assert_array_equal(torch.from_dlpack(found).numpy(), pipe.guided(x, pipe.prepare_once(0.6, CLASSES)))


def test_guided_of_a_torch_tensor_with_branches_returns_numpys(
    pipe: Pipeline, plan: PreparedRun, x: NDArray[np.float32]
) -> None:
    found: Any = pipe.branches(torch.from_numpy(x), plan, 0)  # type: ignore[call-overload]
    expected: Any = pipe.branches(x, plan, 0)  # type: ignore[call-overload]
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, b)


def test_guided_of_a_prediction_goes_on_from_it(pipe: Pipeline, plan: PreparedRun, x: NDArray[np.float32]) -> None:
    """The sampler is in PyTorch, and its states never become NumPy arrays."""
    state, steps = torch.from_numpy(x.copy()), x
    for _ in range(3):
        state = state - 0.25 * torch.from_dlpack(pipe.guided(state, plan, 0))  # type: ignore[call-overload]
        steps = steps - np.float32(0.25) * pipe.guided(steps, plan, 0)
    # PyTorch may fuse the product and the sum: one rounding in each of three steps.
    np.testing.assert_allclose(state.numpy(), steps, rtol=1e-5, atol=1e-5)


def test_guided_of_more_tensors_than_a_batch_is_that_of_numpy(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    """Four images run in groups of three. The last group is padded."""
    four = np.concatenate([x, x[:1]])
    found: Any = pipe.guided(torch.from_numpy(four), pipe.prepare_once(0.6, [*CLASSES, 2]))  # type: ignore[call-overload]
    np.testing.assert_array_equal(
        torch.from_dlpack(found).numpy(), pipe.guided(four, pipe.prepare_once(0.6, [*CLASSES, 2]))
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x.double(), "float64 of shape (3, 2, 8, 8)"),
        (lambda x: x.half(), "float16 of shape (3, 2, 8, 8)"),
        (lambda x: x[:2], "float32 of shape (2, 2, 8, 8)"),
        (lambda x: x[0], "float32 of shape (2, 8, 8)"),
    ],
)
def test_guided_of_another_tensor_is_refused(
    pipe: Pipeline,
    plan: PreparedRun,
    x: NDArray[np.float32],
    change: Callable[[torch.Tensor], torch.Tensor],
    found: str,
) -> None:
    with pytest.raises(UsageError) as caught:
        pipe.guided(change(torch.from_numpy(x)), plan, 0)  # type: ignore[call-overload]
    assert str(caught.value) == f"x: expected float32 of shape (3, 2, 8, 8), found {found}"


@pytest.mark.parametrize(
    "change",
    [lambda x: x.bfloat16(), lambda x: x.clone().requires_grad_(), lambda x: x.to("meta"), lambda x: x.tolist()],
    ids=["bfloat16", "gradient", "meta", "list"],
)
def test_guided_of_what_dlpack_does_not_hand_over_is_refused(
    pipe: Pipeline, plan: PreparedRun, x: NDArray[np.float32], change: Callable[[torch.Tensor], Any]
) -> None:
    with pytest.raises(UsageError, match="expected a NumPy array, or one that DLPack can export to the CPU, found "):
        pipe.guided(change(torch.from_numpy(x)), plan, 0)


def test_guided_of_a_tensor_that_is_a_view_is_the_same(
    pipe: Pipeline, plan: PreparedRun, x: NDArray[np.float32]
) -> None:
    """One view has gaps, the other has its axes in another order."""
    tensor, expected = torch.from_numpy(x), pipe.guided(x, plan, 0)
    for view in (tensor.repeat_interleave(2, 0)[::2], tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert not view.is_contiguous()
        found: Any = pipe.guided(view, plan, 0)  # type: ignore[call-overload]
        np.testing.assert_array_equal(torch.from_dlpack(found).numpy(), expected)


# Samples


def test_sample_on_the_device_is_an_array_of_the_callers(pipe: Pipeline) -> None:
    """On the CPU the array is a NumPy array that no later run writes into."""
    plain = pipe.sample(CLASSES, SEEDS, steps=3)
    found: Any = pipe.sample_on_device(CLASSES, SEEDS, steps=3)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, plain)
    pipe.sample([4, 4, 4], [1, 2, 3], steps=3)
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_array_equal(torch.from_dlpack(found).numpy(), plain)


def test_sample_without_on_device_is_an_array_of_the_callers(pipe: Pipeline) -> None:
    found = pipe.sample(CLASSES, SEEDS, steps=3)
    kept = found.copy()
    found += 1
    np.testing.assert_array_equal(pipe.sample(CLASSES, SEEDS, steps=3), kept)


# Warm pipelines


@pytest.mark.parametrize("mode", ["sg", "cfg"])
@pytest.mark.parametrize("images", [1, 3, 4])
def test_warmup_opens_and_binds_what_a_later_run_needs(
    tiny_bundle: Path, watch: Callable[[Path], Any], mode: Any, images: int
) -> None:
    """A later run of the same images and steps opens no session.

    It also binds no launch and allocates no buffer of a workspace.
    """
    opened: list[Path] = []

    def open_graph(path: Path) -> Any:
        opened.append(path)
        return open_session(path)

    backend = watch(tiny_bundle)
    backend.backend = OrtBackend(Bundle.open(tiny_bundle), open_graph=open_graph)
    pipe = Pipeline(Bundle.open(tiny_bundle), backend, 3)
    guidance = pipe.guidance(mode)
    pipe.warmup(images, steps=4, guidance=guidance)
    assert len(opened) == len(set(opened)) > 0
    opened.clear()
    backend.events.clear()
    held = backend.memory.live
    pipe.sample([*range(images)], range(9, 9 + images), steps=4, guidance=guidance)
    assert not opened
    assert not [event for event in backend.events if event.kind == "bind" and event.fixed]
    assert backend.memory.live == held


def test_warmup_without_arguments_is_a_run_of_the_bundles(pipe: Pipeline, backend: Any) -> None:
    pipe.warmup()
    assert len(backend.steps) == pipe.bundle.manifest.sampling.steps


@pytest.mark.parametrize("images", [0, -1])
def test_warmup_of_no_images_is_refused(pipe: Pipeline, images: int) -> None:
    with pytest.raises(UsageError, match=f"images: expected at least 1, found {images}"):
        pipe.warmup(images)


# Loading


@pytest.mark.parametrize("chunk", [0, -1])
def test_load_of_a_chunk_below_one_is_refused(tiny_bundle: Path, chunk: int) -> None:
    with pytest.raises(UsageError, match=f"chunk: expected at least 1, found {chunk}"):
        Pipeline.load(tiny_bundle, chunk=chunk)


def test_load_of_a_chunk_is_the_pipelines(tiny_bundle: Path) -> None:
    whole, pieces = Pipeline.load(tiny_bundle), Pipeline.load(tiny_bundle, chunk=2)
    assert (whole.chunk, pieces.chunk) == (None, 2)
    asked: dict[str, Any] = {"classes": CLASSES, "seeds": SEEDS, "steps": 3}
    np.testing.assert_array_equal(pieces.sample(**asked), whole.sample(**asked))


@pytest.mark.parametrize("threads", [1, 2])
def test_load_of_threads_is_what_a_run_on_the_cpu_takes(tiny_bundle: Path, threads: int) -> None:
    pipe = Pipeline.load(tiny_bundle, threads=threads)
    session = pipe.backend.session(pipe.bundle.manifest.hoisted("main")[0])  # type: ignore[attr-defined]
    assert session.get_session_options().intra_op_num_threads == threads
    expected = Pipeline.load(tiny_bundle).sample(CLASSES, SEEDS, steps=2)
    np.testing.assert_allclose(pipe.sample(CLASSES, SEEDS, steps=2), expected, atol=1e-5)


@pytest.mark.parametrize("threads", [0, -1])
def test_load_of_no_threads_is_refused(tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads: expected at least 1, found {threads}"):
        Pipeline.load(tiny_bundle, threads=threads)


@pytest.fixture
def read_only(edited: Callable[[Callable[[Any], object]], Path]) -> Iterator[Path]:
    """Yield a copy of the tiny bundle in which nothing may be written."""
    bundle = edited(lambda content: None)
    paths = [bundle, *bundle.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield bundle
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_load_of_a_bundle_that_is_read_only_runs_the_same(read_only: Path, tiny_bundle: Path) -> None:
    """The run leaves no file in the bundle."""
    before = sorted(read_only.rglob("*"))
    pipe = Pipeline.load(read_only)
    pipe.warmup(steps=2)
    expected = Pipeline.load(tiny_bundle).sample(CLASSES, SEEDS, steps=2)
    np.testing.assert_array_equal(pipe.sample(CLASSES, SEEDS, steps=2), expected)
    assert sorted(read_only.rglob("*")) == before


@pytest.fixture
def copy(edited: Callable[[Callable[[Any], object]], Path]) -> Path:
    """Return a copy of the tiny bundle."""
    return edited(lambda content: None)


CHANGED = "was changed after the bundle was loaded: load the bundle again"


@pytest.mark.parametrize("before", [False, True])
def test_sample_from_a_bundle_that_was_replaced_after_load_is_refused(
    copy: Path, tiny_cosine_bundle: Path, before: bool
) -> None:
    """Graphs of two bundles never run together, also if a run before opened some of them."""
    pipe = Pipeline.load(copy)
    if before:
        pipe.sample([0], [0], steps=2, guidance=pipe.guidance("none"))
    shutil.rmtree(copy)
    shutil.copytree(tiny_cosine_bundle, copy)
    flip(copy / "graphs/weights.bin")
    with pytest.raises(BundleError, match=CHANGED):
        pipe.sample([0], [0], steps=2)


def test_sample_from_a_bundle_that_was_replaced_after_warmup_is_the_same(copy: Path) -> None:
    """All graphs are open, and the replaced files live on in their mappings."""
    pipe = Pipeline.load(copy)
    pipe.warmup()
    expected = pipe.sample([0], [0])
    shutil.rmtree(copy)
    np.testing.assert_array_equal(pipe.sample([0], [0]), expected)


def test_sample_from_weights_that_were_written_in_place_is_refused(copy: Path) -> None:
    pipe = Pipeline.load(copy)
    pipe.warmup(steps=2)
    flip(copy / "graphs/weights.bin")
    with pytest.raises(BundleError, match=CHANGED):
        pipe.sample([0], [0], steps=2)
    flip(copy / "graphs/weights.bin")
    pipe.sample([0], [0], steps=2)


def flip(path: Path) -> None:
    """Flip the last bit of a file in place."""
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def test_load_of_an_opened_bundle_reads_no_hash_again(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle)
    monkeypatch.delattr("sg_runtime.bundle.sha256_of")
    assert Pipeline.load(bundle).bundle is bundle


@pytest.mark.parametrize(("usable", "expected"), [(3, 3), (4, 1)])
def test_load_without_threads_takes_the_cores_that_the_process_may_use(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, usable: int, expected: int
) -> None:
    """If the process may use all cores, ONNX Runtime decides, in these tests for one thread."""
    monkeypatch.setattr("sg_runtime.backends.ort.usable_cores", lambda: usable)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    session = open_session(tiny_bundle / "graphs/condition.onnx")
    assert session.get_session_options().intra_op_num_threads == expected


def test_pickle_of_a_pipeline_is_opened_again_in_another_process(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The path may be relative; the other process works in another folder."""
    monkeypatch.chdir(copy.parent)
    pipe = Pipeline.load(copy.name, "cpu", batch=2, chunk=3, threads=1)
    monkeypatch.chdir(tmp_path.parent)
    expected = pipe.sample([0], [0], steps=2)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found, settings = pool.submit(sampled, pipe).result()
    np.testing.assert_array_equal(found, expected)
    assert settings == (2, 3, {**(pipe._arguments or {}), "verify_hashes": True})


def sampled(pipe: Pipeline) -> tuple[NDArray[np.float32], Any]:
    """Sample with a pipeline that another process has pickled, and return its settings, too."""
    return pipe.sample([0], [0], steps=2), (pipe.batch, pipe.chunk, pipe._arguments)


def test_pickle_of_a_pipeline_whose_bundle_was_replaced_is_refused(copy: Path, tiny_cosine_bundle: Path) -> None:
    content = pickle.dumps(Pipeline.load(copy))
    shutil.rmtree(copy)
    shutil.copytree(tiny_cosine_bundle, copy)
    with pytest.raises(BundleError, match="expected the bundle that was pickled, found another one: load the bundle"):
        pickle.loads(content)


def test_pickle_of_a_pipeline_that_was_not_loaded_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"^pickle: expected a pipeline of Pipeline\.load"):
        pickle.dumps(pipe)
