"""Writer of graphs that share one file of weights."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from sg_runtime.errors import ExportError
from sg_runtime.files import is_full


def write_graphs(
    models: Iterable[ir.Model], folder: Path, weights_file: str, external_min_bytes: int = 1024
) -> list[Path]:
    """Write each model to `folder` as NAME.onnx, and all weights to one `weights_file` next to it.

    external_min_bytes: initializers with fewer bytes stay inside the graphs. So do int64 tensors,
    which are shapes and positions: shape inference reads their values, and not from a file.

    Initializers of one name must be the same tensor in every graph, as `trace` makes them. Each is
    written once. Returns the paths of the graphs. Raises ExportError for an initializer without a
    value, and for one whose shape or type differs between graphs. Raises OSError if the disk is
    full, with the system's number of that error.
    """
    models = list(models)
    tensors: dict[str, ir.TensorProtocol] = {}
    values: list[ir.Value] = []
    for model in models:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise ExportError(f"graph {model.graph.name}: initializer {name} has no value")
            if tensor.nbytes >= external_min_bytes and tensor.dtype != ir.DataType.INT64:
                known = tensors.setdefault(name, tensor)
                if known.shape != tensor.shape or known.dtype != tensor.dtype:
                    raise ExportError(f"graph {model.graph.name}: initializer {name} differs between graphs")
                values.append(value)
    try:
        external = ir.external_data.convert_tensors_to_external(list(tensors.values()), folder, weights_file)
    except OSError as error:  # NumPy hides the system's reason, and the partial file is gone
        if error.errno is None and is_full(folder, sum(tensor.nbytes for tensor in tensors.values())):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / weights_file)) from error
        raise
    by_name = dict(zip(tensors, external, strict=True))
    paths = []
    for value in values:
        value.const_value = by_name[str(value.name)]
    for model in models:
        path = folder / f"{model.graph.name}.onnx"
        ir.save(model, path)
        paths.append(path)
    return paths
