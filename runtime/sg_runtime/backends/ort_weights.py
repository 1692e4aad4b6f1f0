"""Weights of ONNX graphs on a GPU, once for all sessions of ONNX Runtime.

A session copies its weights to the device. If it is given them as initializers that are already
there (`SessionOptions.add_initializer`), it uses those. The field numbers of the messages below are
those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sg_runtime.devices.memory import DeviceArray, Memory
from sg_runtime.extras import require

_GRAPH = 7  # of ModelProto
_INITIALIZER = 5  # of GraphProto
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA = 1, 2, 8, 13  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto

_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("float32"),
    2: np.dtype("uint8"),
    3: np.dtype("int8"),
    10: np.dtype("float16"),
}
"""NumPy dtype of each shared type, by TensorProto.DataType. Sessions copy other weights."""


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer whose values are in a file: `dtype` of `shape`, from byte `offset` on."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    offset: int


class DeviceWeights:
    """The weight files of some graphs, uploaded once each."""

    def __init__(self, memory: Memory, graphs: Iterable[Path]) -> None:
        """Upload the weights. Raises DeviceMemoryError if the memory does not suffice."""
        self._weights = {path: tuple(weights_of(path)) for path in graphs}
        files = {weight.file for weights in self._weights.values() for weight in weights}
        self._files: dict[Path, DeviceArray] = {}
        for file in sorted(files):
            content = np.memmap(file, np.uint8, "r")
            self._files[file] = memory.empty(content.shape, np.uint8)
            memory.upload(content, self._files[file])
        memory.wait()

    def values(self, graph: Path) -> dict[str, Any]:
        """Return the weights of a graph by their names, as values of ONNX Runtime."""
        return {weight.name: self._value(weight) for weight in self._weights[graph]}

    def _value(self, weight: Weight) -> Any:
        size = int(np.prod(weight.shape, dtype=np.int64)) * weight.dtype.itemsize
        part = self._files[weight.file][weight.offset : weight.offset + size]
        return require("onnxruntime").OrtValue.from_dlpack(part.view(weight.dtype).reshape(weight.shape))


def weights_of(path: Path) -> Iterator[Weight]:
    """Yield the initializers of a graph that are in other files and have a shared type."""
    for model_field, graph in _fields(path.read_bytes()):
        for graph_field, tensor in _fields(graph) if model_field == _GRAPH else ():
            if graph_field == _INITIALIZER:
                yield from _weight(path.parent, tensor)


def _weight(folder: Path, tensor: Any) -> Iterator[Weight]:
    name, number, shape, place = "", 0, [], {}
    for field, value in _fields(tensor):
        if field == _NAME:
            name = bytes(value).decode()
        elif field == _DATA_TYPE:
            number = value
        elif field == _DIMS:  # one field for each, or one with all
            shape += [value] if isinstance(value, int) else [size for _, size in _varints(value)]
        elif field == _EXTERNAL_DATA:
            entry = dict(_fields(value))
            place[bytes(entry[_KEY]).decode()] = bytes(entry[_VALUE]).decode()
    if "location" in place and number in _TYPES:
        yield Weight(name, _TYPES[number], tuple(shape), folder / place["location"], int(place.get("offset", 0)))


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message: an int, or bytes."""
    view, at = memoryview(message), 0
    while at < len(view):
        at, tag = next(_varints(view, at))
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            at, value = next(_varints(view, at))
            yield number, value
            continue
        if kind == 2:
            at, size = next(_varints(view, at))
        else:
            size = {1: 8, 5: 4}[kind]
        yield number, view[at : at + size]
        at += size


def _varints(view: Any, at: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the integers from byte `at` on, each with the position after it."""
    value = shift = 0
    while at < len(view):
        byte = view[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            yield at, value
            value = shift = 0
