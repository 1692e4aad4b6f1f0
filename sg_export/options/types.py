"""Types of the matmuls and of attention that are not quantized."""

from collections.abc import Mapping
from dataclasses import dataclass

from sg_runtime.manifest import Precision


@dataclass(frozen=True, slots=True)
class ParityGates:
    """Gates of the comparisons with PyTorch.

    graph, run: largest relative L2 distance of one graph run, and of a complete sampling run.
    cosine: least cosine similarity of both.
    """

    graph: float
    run: float
    cosine: float


@dataclass(frozen=True, slots=True)
class BaseType:
    """A floating-point type.

    onnx: its number among ONNX's tensor types.
    build_limit: relative L2 distance to PyTorch above which a graph is wrong. Rounding stays below
    it, a fault is far above.
    gates: gates of `sg-export verify`.
    tolerance: absolute and relative tolerance of the Polygraphy commands that verify prints.
    """

    onnx: int
    build_limit: float
    gates: ParityGates
    tolerance: float


BASES: Mapping[Precision, BaseType] = {
    "fp32": BaseType(1, 1e-4, ParityGates(1e-5, 1e-4, 0.99999), 1e-4),
    "fp16": BaseType(10, 2e-2, ParityGates(2e-2, 2e-2, 0.9995), 2e-2),
    "bf16": BaseType(16, 5e-2, ParityGates(2e-2, 2e-2, 0.9995), 2e-2),
}
"""Types by the names that users give them. The gates have these reasons.

FP32: the order of summation alone causes about 1e-6 at the depth of XL/2. Guidance and sampling
multiply the rounding errors of single graph runs by up to some tens. Half precision: two images
that differ by 2 % look the same. Steps round independently, so the error of a run is not larger
than the error of one of its evaluations. The cosine gates follow from the distances, with a margin;
they expose a wrong sign or order at a glance.
"""
