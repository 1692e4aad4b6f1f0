"""The largest values inside a half-precision graph, relative to the range of their type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from sg_export.graph.emulate import ROUNDED, emulated
from sg_runtime.backends.ort import open_session


def range_shares(path: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return the largest magnitude of each half-precision operator's output, relative to its type.

    path: the graph. The keys are the operators' names, which begin with the names of their modules,
    in the order of execution. A value is the largest magnitude divided by the largest finite number
    of the type. It is above 1, or NaN, if an output is out of range.
    """
    model = onnx.load_from_string(emulated(path))
    roundings = [node for node in model.graph.node if node.name.endswith(ROUNDED)]
    model.graph.output.extend(onnx.ValueInfoProto(name=node.input[0]) for node in roundings)
    session = open_session(path, model.SerializeToString())
    values = session.run([node.input[0] for node in roundings], dict(feeds))
    shares = {}
    for node, value in zip(roundings, values, strict=True):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
        limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        shares[node.name.removesuffix(ROUNDED)] = float(np.abs(value).max()) / limit
    return shares


def first_overflow(path: Path, feeds: Mapping[str, NDArray[Any]]) -> str | None:
    """Return the first half-precision operator whose output is out of range; None if none is."""
    return next((name for name, share in range_shares(path, feeds).items() if not share <= 1), None)
