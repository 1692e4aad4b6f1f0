"""GPUs that an engine can be built for, and the types of matrix products that they support."""

from collections.abc import Iterable, Mapping

from sg_runtime.errors import UsageError
from sg_runtime.manifest import EngineLibrary

_FROM_AMPERE = frozenset({"fp32", "fp16", "bf16", "int8"})

RTX_PRODUCTS: Mapping[int, frozenset[str]] = {
    75: frozenset({"fp16"}),
    80: _FROM_AMPERE,
    86: _FROM_AMPERE,
    89: _FROM_AMPERE | {"fp8"},
    120: _FROM_AMPERE | {"fp8"},
    121: _FROM_AMPERE | {"fp8"},
}
"""Types of matrix products that TensorRT-RTX can build, by compute capability (86 for 8.6).

Source of 75: test builds (TensorRT-RTX 1.7). Source of FP8: NVIDIA's support matrix. The library
itself also builds FP8 for older targets, which have no FP8 instructions.
"""

TENSORRT_PRODUCTS: Mapping[int, frozenset[str]] = {
    75: frozenset({"fp32", "fp16", "int8"}),
    80: _FROM_AMPERE,
    86: _FROM_AMPERE,
    87: _FROM_AMPERE,  # Jetson Orin
    89: _FROM_AMPERE | {"fp8"},
    90: _FROM_AMPERE | {"fp8"},
    100: _FROM_AMPERE | {"fp8"},
    101: _FROM_AMPERE | {"fp8"},  # Thor in CUDA 12
    103: _FROM_AMPERE | {"fp8"},
    110: _FROM_AMPERE | {"fp8"},  # Thor in CUDA 13
    120: _FROM_AMPERE | {"fp8"},
    121: _FROM_AMPERE | {"fp8"},
}
"""Types of matrix products that TensorRT can build, by compute capability.

Source: NVIDIA's support matrices of TensorRT (FP8 from 8.9 on, BF16 from 8.0 on), that of DRIVE OS
7 for Thor. CUDA 13 renamed Thor's compute capability from 10.1 to 11.0. None of it has been built.
"""


def check_gpu(name: str, number: int, products: Iterable[str]) -> None:
    """Check that TensorRT can build a graph for the GPU of this machine.

    name, number: the GPU's name and compute capability; nothing is known about a newer one.
    products: types of the graph's matrix products. Raises UsageError if the GPU lacks one.
    """
    known = TENSORRT_PRODUCTS.get(number)
    if known is not None and (missing := sorted(set(products) - known)):
        raise UsageError(
            f"`precision`: {name} (SM {number}): expected matrix products in {', '.join(sorted(known))}, found "
            f"{', '.join(missing)}: give another precision"
        )


def check_targets(library: EngineLibrary, compute_capabilities: Iterable[int], products: Iterable[str]) -> None:
    """Check that `library` can build a graph for these GPUs.

    products: types of the graph's matrix products. Raises UsageError if a GPU or a type is not
    supported.
    """
    wanted = sorted(set(products))
    for number in compute_capabilities:
        if library == "tensorrt":
            raise UsageError(
                f"`compute_capabilities` {number}: TensorRT builds for the GPU that it runs on: leave out "
                f"`compute_capabilities`, or build with TensorRT-RTX"
            )
        known = RTX_PRODUCTS.get(number)
        if known is None:
            raise UsageError(
                f"`compute_capabilities` {number}: TensorRT-RTX builds for {', '.join(map(str, RTX_PRODUCTS))}: for "
                f"others, such as H100 (90), Jetson Orin (87) and Thor (110), build with TensorRT on that GPU, or "
                f"build ONNX graphs"
            )
        if missing := [product for product in wanted if product not in known]:
            able = [str(sm) for sm, types in RTX_PRODUCTS.items() if set(wanted) <= types]
            raise UsageError(
                f"`compute_capabilities` {number}: expected matrix products in {', '.join(sorted(known))}, found "
                f"{', '.join(missing)}: give another `precision`, or GPUs that support it: {', '.join(able)}"
            )
