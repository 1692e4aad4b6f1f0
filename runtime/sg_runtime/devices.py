"""The NVIDIA GPUs of this machine, asked of the driver."""

from dataclasses import dataclass
from typing import Any

from sg_runtime.errors import EngineError
from sg_runtime.extras import require


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. compute_capability: 86 for 8.6."""

    name: str
    compute_capability: int


def find_gpus() -> tuple[Gpu, ...]:
    """All GPUs, none where there is no driver.

    Raises MissingExtraError where cuda-bindings is not installed, EngineError where the driver does not answer.
    """
    driver = require("cuda.bindings.driver", "tensorrt-rtx")
    try:
        status, *_ = driver.cuInit(0)
    except RuntimeError:  # no driver library; cuda-bindings raises a subclass that has moved before
        return ()
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        return ()
    _check("cuInit", status, driver)
    return tuple(_gpu(driver, index) for index in range(_call(driver, "cuDeviceGetCount")))


def _gpu(driver: Any, index: int) -> Gpu:
    device = _call(driver, "cuDeviceGet", index)
    attribute = driver.CUdevice_attribute
    major = _call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = _call(driver, "cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    name: bytes = _call(driver, "cuDeviceGetName", 256, device)
    return Gpu(name.split(b"\0")[0].decode(), 10 * major + minor)


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    status, result = getattr(driver, name)(*arguments)
    _check(name, status, driver)
    return result


def _check(name: str, status: Any, driver: Any) -> None:
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"the CUDA driver: {name} gave {status.name}; nvidia-smi may say more")
