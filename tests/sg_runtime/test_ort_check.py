"""Whether ONNX Runtime's CUDA provider works here, on stand-ins for the library and the driver."""

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_stand_in import CUresult, Driver

from sg_runtime.backends import choose_backend, choose_onnx_backend, ort_check
from sg_runtime.backends.ort_check import LEAST, check_cuda_provider, preload_libraries, two_wheels
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, DeviceError, EngineError, MissingExtraError, SgError

INSTALL = "pip install -e '.[ort-gpu]' in a checkout of sg-export"
REPLACE = f"pip uninstall -y onnxruntime onnxruntime-gpu, then {INSTALL}"
MISSING = "libcublas.so.13: cannot open shared object file: No such file or directory"


class Library(SimpleNamespace):
    """Stand-in for the module `onnxruntime` of onnxruntime-gpu.

    missing: libraries that cannot be loaded. fault: what the provider says when it is used.
    threads: threads that used it.
    """

    def __init__(self) -> None:
        super().__init__(__version__=LEAST, cuda_version="13.0", missing=(), fault=None, threads=[])
        self.providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self._allocate)

    def get_available_providers(self) -> list[str]:
        return self.providers

    def preload_dlls(self) -> None:
        """Print what is missing to standard output, as the library does."""
        for name in self.missing:
            print(f"Failed to load {name.partition(':')[0]}: {name}")
        if self.missing:
            print("Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.")

    def _allocate(self, shape: Any, dtype: Any, kind: str, number: int) -> object:
        assert (shape, kind) == ([1], "cuda")
        self.threads.append((threading.get_ident(), number))
        if self.fault is not None:
            raise RuntimeError(self.fault)
        return object()


@pytest.fixture
def library(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Replace ONNX Runtime by a stand-in whose provider works."""
    stand_in = Library()
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)  # type: ignore[arg-type]
    install(monkeypatch, {"onnxruntime-gpu": LEAST})
    return stand_in


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Let only these distributions be installed."""
    found = SimpleNamespace(version=versions.__getitem__, PackageNotFoundError=KeyError)
    monkeypatch.setattr(ort_check, "metadata", found)


def refused(kind: type[SgError], number: int = 0) -> str:
    """Return the message of the refusal, which prints nothing."""
    with pytest.raises(SgError) as caught:
        check_cuda_provider(number)
    assert type(caught.value) is kind
    return str(caught.value)


def test_check_of_a_provider_that_works_uses_it_in_another_thread(library: Library, driver: Driver) -> None:
    """The provider makes its GPU current in the thread that uses it."""
    driver.count = 2
    check_cuda_provider(0)
    check_cuda_provider(1)
    assert [number for _, number in library.threads] == [0, 1]
    assert threading.get_ident() not in dict(library.threads)


def test_check_without_the_provider_says_how_to_get_it(library: Library) -> None:
    library.providers.pop(0)
    assert refused(EngineError) == (f"ONNX Runtime here has no CUDAExecutionProvider; for an NVIDIA GPU: {REPLACE}")


def test_check_of_two_wheels_names_both(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are those of the wheel that was installed last, here of the one for CPUs."""
    assert two_wheels() is None
    install(monkeypatch, {"onnxruntime-gpu": LEAST, "onnxruntime": "1.32.0"})
    library.providers.pop(0)
    message = refused(EngineError)
    both = f"onnxruntime 1.32.0 and onnxruntime-gpu {LEAST} are both installed and share their files"
    assert both in message
    assert message.endswith(REPLACE)


@pytest.mark.parametrize("version", ["1.24.0", "1.30.0", "1.31.0"])
def test_check_of_a_release_with_wrong_captures_is_refused(library: Library, version: str) -> None:
    library.__version__ = version
    assert refused(EngineError) == (
        f"onnxruntime-gpu {version} is older than {LEAST}, before which captured CUDA graphs compute wrong samples: "
        f"pip install 'onnxruntime-gpu[cuda]>={LEAST}'"
    )
    for library.__version__ in ("1.31.1", "1.32.0", "2.0"):
        check_cuda_provider(0)


def test_least_release_is_that_of_the_extra() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'^ort-gpu = .*"onnxruntime-gpu\[cuda\]>=([\d.]+)"', text, re.MULTILINE)[1] == LEAST  # type: ignore[index]


@pytest.mark.parametrize(("number", "count"), [(0, 0), (2, 2)])
def test_check_of_a_gpu_that_is_not_there_is_refused(library: Library, driver: Driver, number: int, count: int) -> None:
    driver.count = count
    assert refused(BundleError, number) == f"cuda:{number}: expected a GPU of this number, found {count}"


def test_check_without_cuda_bindings_names_the_extra(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert refused(MissingExtraError) == f"cuda.bindings.driver is not installed: {INSTALL}"


@pytest.mark.parametrize(("version", "found"), [(12080, "12.8"), (12020, "12.2")])
def test_check_of_a_driver_that_is_too_old_says_which_to_install(
    library: Library, driver: Driver, version: int, found: str
) -> None:
    """A driver of the same major version suffices."""
    driver.version = version
    message = refused(DeviceError)
    assert message == (
        f"the CUDA driver supports CUDA {found}, and onnxruntime-gpu {LEAST} is built for CUDA 13.0: install NVIDIA's "
        f"driver 580 or later"
    )
    library.cuda_version = "12.8"
    check_cuda_provider(0)
    driver.version, library.cuda_version = 13000, "13.2"
    check_cuda_provider(0)


def test_check_of_a_library_that_does_not_load_says_why_and_prints_nothing(
    library: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    library.missing = (MISSING, "libcurand.so.10: cannot open shared object file")
    assert refused(EngineError) == (
        f"CUDAExecutionProvider cannot be loaded: {MISSING}; libcurand.so.10: cannot open shared object file; {INSTALL}"
    )
    assert not library.threads
    assert capfd.readouterr().out == ""


def test_check_of_a_provider_that_fails_says_why(library: Library) -> None:
    library.fault = "CUDA Provider not available, can't get interface for it\n\n"
    assert refused(EngineError) == (
        f"CUDAExecutionProvider cannot be loaded: CUDA Provider not available, can't get interface for it; {INSTALL}"
    )


def test_preload_of_the_library_itself_is_a_list(capfd: pytest.CaptureFixture[str]) -> None:
    """The CPU's wheel preloads nothing. The library's own signs are those that are read."""
    ort = pytest.importorskip("onnxruntime")
    assert preload_libraries() == []
    assert capfd.readouterr().out == ""
    assert 'print(f"Failed to load {dll_filename}: {e}")' in Path(ort.__file__).read_text()


# What device "auto" takes.

FAULTS: dict[str, Callable[[Library, Driver], object]] = {
    "missing library": lambda library, driver: setattr(library, "missing", (MISSING,)),
    "old release": lambda library, driver: setattr(library, "__version__", "1.30.0"),
    "old driver": lambda library, driver: setattr(driver, "version", 12080),
    "no provider": lambda library, driver: library.providers.pop(0),
    "provider fails": lambda library, driver: setattr(library, "fault", "CUDA error 999"),
    "no gpu": lambda library, driver: setattr(driver, "count", 0),
    "driver fails": lambda library, driver: driver.statuses.update(cuInit=CUresult.CUDA_ERROR_SYSTEM_NOT_READY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_auto_goes_on_to_the_cpu_with_the_reason(
    library: Library, driver: Driver, fault: str, tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert choose_onnx_backend().name == "onnxruntime-cuda"  # type: ignore[union-attr]
    FAULTS[fault](library, driver)
    reason = refused(type(caught(0)))
    for chosen in (choose_onnx_backend(), choose_backend(Bundle.open(tiny_bundle))):
        assert chosen is not None
        assert chosen.name == "onnxruntime-cpu"
        assert chosen.rejected[-1] == f"onnxruntime-cuda: {reason}"
    assert capfd.readouterr().out == ""


def caught(number: int) -> SgError:
    with pytest.raises(SgError) as error:
        check_cuda_provider(number)
    return error.value
