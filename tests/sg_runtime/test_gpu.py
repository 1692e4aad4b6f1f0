"""Checks that need a GPU: `pytest -m gpu`.

A test that lacks something is skipped and reports what it needs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sg_export.compiler import compile
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_export.parity.verify import TIMES, verify
from sg_runtime.backends.rtx_header import RTX_TARGETS
from sg_runtime.backends.trt_check import installed_version
from sg_runtime.bundle import Bundle
from sg_runtime.devices.cuda import CudaMemory
from sg_runtime.devices.gpus import find_gpus
from sg_runtime.errors import SgError
from sg_runtime.manifest import ENGINE_TARGETS, EngineLibrary
from sg_runtime.pipeline import Pipeline

pytestmark = pytest.mark.gpu

CLASSES, SEEDS = [0, 1, 2], [5, 6, 7]

# Tolerance for FP32 sums in another order, over all evaluations of a run.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def gpu() -> int:
    """Return the compute capability of the first GPU."""
    try:
        found = find_gpus()
    except SgError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip("needs a GPU and its driver")
    return found[0].compute_capability


@pytest.fixture(scope="module")
def memory(gpu: int) -> Iterator[CudaMemory]:
    memory = CudaMemory()
    memory.enter()
    yield memory
    memory.leave()


@pytest.fixture(scope="module")
def fixed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return graphs of three images. No node in them computes shapes."""
    return compile(tiny_checkpoint, CompileOptions(tmp_path_factory.mktemp("gpu") / "fixed", (0.5,), batch=3)).path


def cuda(bundle: Path, **options: Any) -> Pipeline:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    return Pipeline.load(bundle, "cuda", **options)


def distance(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_memory_takes_and_gives_back_what_was_put_there(memory: CudaMemory) -> None:
    values = np.random.default_rng(0).standard_normal((5, 3, 7)).astype(np.float32)
    place, other = memory.empty(values.shape, np.float32), memory.empty((5, 32), np.float32)
    memory.upload(values, place)
    memory.take(place, np.array([2, 0, 0, 1]), other)
    np.testing.assert_array_equal(memory.download(other)[:, :28], values[:, [2, 0, 0, 1]].reshape(5, 28))
    replay = memory.capture(lambda: memory.copy(place[1:2], place[0:1]))
    replay()
    np.testing.assert_array_equal(memory.download(place[0]), values[1])


def test_array_of_torch_comes_and_goes_without_a_copy(memory: CudaMemory) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    tensor = torch.arange(6.0, device="cuda").reshape(2, 3)
    held = memory.hold(tensor)
    assert held.address == tensor.data_ptr()
    assert torch.from_dlpack(held).data_ptr() == tensor.data_ptr()
    np.testing.assert_array_equal(memory.download(held), tensor.cpu().numpy())


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_sample_by_onnxruntime_on_a_gpu_is_that_of_the_cpu(gpu: int, fixed: Path, capture: bool, sampler: Any) -> None:
    """The three runs are the first, the captured and the replayed one."""
    expected = Pipeline.load(fixed, "cpu").sample(CLASSES, SEEDS, steps=4, sampler=sampler)
    pipe = cuda(fixed, capture=capture)
    for _ in range(3):
        assert distance(pipe.sample(CLASSES, SEEDS, steps=4, sampler=sampler), expected) < CLOSE


def test_sessions_on_a_gpu_share_the_weights(gpu: int, fixed: Path) -> None:
    """Sessions that copied the weights from the file would not see that they were set to zero."""
    pipe = cuda(fixed)
    memory: Any = pipe.backend._memory  # type: ignore[attr-defined]
    memory.enter()
    for content in pipe.backend._shared._files.values():  # type: ignore[attr-defined]
        memory.upload(np.zeros(content.shape, content.dtype), content)
    memory.wait()
    memory.leave()
    expected = Pipeline.load(fixed, "cpu").sample(CLASSES, SEEDS, steps=1)
    assert distance(pipe.sample(CLASSES, SEEDS, steps=1), expected) > 0.01


def test_sample_on_a_gpu_from_eight_threads_is_that_of_one(gpu: int, fixed: Path) -> None:
    pipe = cuda(fixed)
    expected = [pipe.sample(CLASSES, [seed] * 3, steps=3) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda seed: pipe.sample(CLASSES, [seed] * 3, steps=3), range(8)))
    for own, one in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, one)


@pytest.fixture(scope="module")
def engines(gpu: int, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return FP32 engines of three images, and their graphs.

    TensorRT-RTX builds them if it supports this GPU, otherwise TensorRT.
    """
    library: EngineLibrary = "tensorrt_rtx" if gpu in RTX_TARGETS else "tensorrt"
    if installed_version(library) is None:
        pytest.skip(f"needs {ENGINE_TARGETS[library]} for a GPU of compute capability {gpu}")
    folder = tmp_path_factory.mktemp("engines")
    options = CompileOptions(folder / "out", (0.5,), engines=EngineOptions((library,), batch=(3,), keep_onnx=True))
    return compile(shutil.copy(tiny_checkpoint, folder), options)


def test_sample_by_an_engine_is_that_of_the_cpu(engines: Bundle) -> None:
    expected = Pipeline.load(engines, "cpu").sample(CLASSES, SEEDS, steps=4)
    pipe = Pipeline.load(engines, "cuda")
    assert pipe.backend.name == ENGINE_TARGETS[engines.manifest.engines[0].library]
    for _ in range(3):
        assert distance(pipe.sample(CLASSES, SEEDS, steps=4), expected) < CLOSE


def test_engines_agree_with_pytorch_by_the_commands_that_verify_prints(engines: Bundle, tmp_path: Path) -> None:
    commands = [line for line in verify(engines.path, save_polygraphy=tmp_path).commands if "--trt" in line]
    assert len(commands) == sum(len(engine.profiles) for engine in engines.manifest.engines)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for command in commands:
        done = subprocess.run(
            command, shell=True, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Passed: {len(TIMES)}/{len(TIMES)} iterations" in done.stdout
