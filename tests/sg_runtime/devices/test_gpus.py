"""The GPUs that the driver reports.

The real driver answers only if there is a GPU, so most tests use a stand-in for the module of
cuda-bindings. One test needs a GPU and queries the real driver.
"""

import importlib
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

import pytest

from sg_runtime.devices.gpus import Gpu, find_gpus
from sg_runtime.errors import DeviceError, MissingExtraError

SMI = shutil.which("nvidia-smi")


class CUresult(IntEnum):
    """Same values as in cuda-bindings."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_SYSTEM_NOT_READY = 802


class CUdevice_attribute(Enum):  # noqa: N801  # cuda-bindings' name
    """Same values as in cuda-bindings."""

    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


@dataclass
class Driver:
    """Stand-in for `cuda.bindings.driver` that returns a status first.

    gpus: name and compute capability (major, minor) of each GPU. statuses: what a function returns
    instead of success.
    """

    gpus: tuple[tuple[str, int, int], ...] = ()
    statuses: dict[str, CUresult] = field(default_factory=dict)

    CUresult = CUresult
    CUdevice_attribute = CUdevice_attribute

    def _answer(self, name: str, result: Any) -> tuple[CUresult, Any]:
        status = self.statuses.get(name, CUresult.CUDA_SUCCESS)
        return status, result if status == CUresult.CUDA_SUCCESS else None

    def cuInit(self, flags: int) -> tuple[CUresult]:  # noqa: N802
        assert flags == 0
        return (self._answer("cuInit", None)[0],)

    def cuDeviceGetCount(self) -> tuple[CUresult, Any]:  # noqa: N802
        return self._answer("cuDeviceGetCount", len(self.gpus))

    def cuDeviceGet(self, index: int) -> tuple[CUresult, Any]:  # noqa: N802
        return self._answer("cuDeviceGet", self.gpus[index])

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: Any) -> tuple[CUresult, Any]:  # noqa: N802
        return self._answer("cuDeviceGetAttribute", device[attribute.value - 74])

    def cuDeviceGetName(self, length: int, device: Any) -> tuple[CUresult, Any]:  # noqa: N802
        return self._answer("cuDeviceGetName", device[0].encode().ljust(length, b"\0"))


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that replaces the real driver."""

    def put(driver: Driver) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)

    return put


@pytest.mark.skipif(SMI is not None, reason="there is a driver")
def test_find_gpus_without_a_driver_finds_none() -> None:
    assert find_gpus() == ()


@pytest.mark.gpu
@pytest.mark.skipif(SMI is None, reason="needs a GPU and its driver")
def test_find_gpus_finds_those_that_nvidia_smi_finds() -> None:
    assert SMI is not None
    command = [SMI, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    expected = [(name, int(number.replace(".", ""))) for name, number in (line.split(", ") for line in lines)]
    assert sorted((gpu.name, gpu.compute_capability) for gpu in find_gpus()) == sorted(expected)


def test_stand_in_has_the_names_and_numbers_of_the_real_driver() -> None:
    real = importlib.import_module("cuda.bindings.driver")
    for name in ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName"):
        assert callable(getattr(real, name))
        assert callable(getattr(Driver, name))
    for status in CUresult:
        assert getattr(real.CUresult, status.name).value == status.value
    for attribute in CUdevice_attribute:
        assert getattr(real.CUdevice_attribute, attribute.name).value == attribute.value


def test_find_gpus_names_all_in_the_drivers_order(put: Any) -> None:
    put(Driver((("NVIDIA GeForce RTX 4090", 8, 9), ("NVIDIA RTX PRO 6000", 12, 0))))
    assert find_gpus() == (Gpu("NVIDIA GeForce RTX 4090", 89), Gpu("NVIDIA RTX PRO 6000", 120))


@pytest.mark.parametrize("driver", [Driver(), Driver(statuses={"cuInit": CUresult.CUDA_ERROR_NO_DEVICE})])
def test_find_gpus_of_a_driver_without_gpus_finds_none(put: Any, driver: Driver) -> None:
    put(driver)
    assert find_gpus() == ()


@pytest.mark.parametrize(
    "name", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName"]
)
def test_find_gpus_of_a_driver_that_fails_says_where(put: Any, name: str) -> None:
    put(Driver((("NVIDIA H100", 9, 0),), {name: CUresult.CUDA_ERROR_SYSTEM_NOT_READY}))
    with pytest.raises(DeviceError) as caught:
        find_gpus()
    assert str(caught.value) == f"the CUDA driver: {name} gave CUDA_ERROR_SYSTEM_NOT_READY; nvidia-smi may say more"
    assert caught.value.exit_code == 6


def test_find_gpus_without_cuda_bindings_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)  # as if it were not installed
    with pytest.raises(MissingExtraError) as caught:
        find_gpus()
    told = "cuda.bindings.driver is not installed: pip install -e '.[tensorrt-rtx]' in a checkout of sg-export"
    assert str(caught.value) == told
