"""The NVIDIA GPUs of this machine, and driver calls that raise this package's errors."""

from dataclasses import dataclass
from typing import Any

from sg_runtime.errors import DeviceError, DeviceMemoryError
from sg_runtime.extras import require


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. compute_capability: as an integer, 86 for 8.6."""

    name: str
    compute_capability: int


def load_driver() -> Any:
    """Return the CUDA driver's functions after initialising the driver.

    Raises MissingExtraError if cuda-bindings is not installed, DeviceError if there is no driver or
    no GPU.
    """
    driver = require("cuda.bindings.driver")
    try:
        call(driver, "cuInit", 0)
    except RuntimeError as error:  # no driver library; cuda-bindings raises a subclass that has moved before
        raise DeviceError(f"the CUDA driver cannot be loaded ({error}): install NVIDIA's driver") from None
    return driver


def find_gpus(extra: str | None = None) -> tuple[Gpu, ...]:
    """Return all GPUs, an empty tuple if there is no driver.

    extra: extra of sg-export that the caller's backend needs; see `require`.
    Raises MissingExtraError if cuda-bindings is not installed, DeviceError if the driver fails.
    """
    driver = require("cuda.bindings.driver", extra)
    try:
        status, *_ = driver.cuInit(0)
    except RuntimeError:  # as in load_driver
        return ()
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        return ()
    _check("cuInit", status, driver)
    return tuple(_gpu(driver, index) for index in range(call(driver, "cuDeviceGetCount")))


def driver_cuda() -> tuple[int, int]:
    """Return the latest CUDA version that the driver supports, such as (13, 0)."""
    number = int(call(load_driver(), "cuDriverGetVersion"))
    return number // 1000, number % 1000 // 10


def _gpu(driver: Any, index: int) -> Gpu:
    device = call(driver, "cuDeviceGet", index)
    attribute = driver.CUdevice_attribute
    major = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    name: bytes = call(driver, "cuDeviceGetName", 256, device)
    return Gpu(name.split(b"\0")[0].decode(), 10 * major + minor)


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the driver. Return None, one value, or a tuple, by its number of results.

    Raises DeviceMemoryError if the memory does not suffice, DeviceError for any other failure.
    """
    status, *results = getattr(driver, name)(*arguments)
    _check(name, status, driver)
    return results[0] if len(results) == 1 else tuple(results) if results else None


def _check(name: str, status: Any, driver: Any) -> None:
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise DeviceMemoryError(f"the CUDA driver: {name} gave {status.name}")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the CUDA driver: {name} gave {status.name}; nvidia-smi may say more")
