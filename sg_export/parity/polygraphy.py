"""Polygraphy runners for the graphs of a bundle: in PyTorch, and on a backend of the runtime."""

import shlex
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from sg_export.graph.check import check_reference
from sg_export.graph.module import subset
from sg_export.loading import LoadedModel
from sg_export.options.types import BASES
from sg_export.parity.compare import Feed
from sg_runtime.backends import Lane
from sg_runtime.bundle import Bundle
from sg_runtime.guidance import guide
from sg_runtime.manifest import GraphFacts
from sg_runtime.run.evaluate import run_once


class TorchRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """A Polygraphy runner that computes one graph of the bundle with the PyTorch model.

    A guided graph is computed in two separate, complete passes. Raises CheckpointError if a value
    is not finite.
    """

    def __init__(self, loaded: LoadedModel, graph: GraphFacts) -> None:
        super().__init__(name="pytorch", prefix="pytorch")
        self.loaded = loaded
        self.graph = graph

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _inputs(self.graph)

    def infer_impl(self, feed_dict: dict[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        given = {name: torch.from_numpy(np.asarray(value)) for name, value in feed_dict.items()}
        model = self.loaded.model
        self.inference_time = 0.0
        with torch.no_grad():
            if self.graph.kind == "condition":
                condition = model.condition(given["t"], given["class"]).numpy()
                check_reference(self.loaded, self.graph.name, condition)
                return OrderedDict(modulations=condition)
            scaled, modulations = given["c_in"] * given["x"], given["modulations"]
            if self.graph.kind == "guided":
                other = given.get("modulations_weak", modulations)
                strong = model.predict(scaled, modulations, subset(given, "_strong"))
                weak = model.predict(scaled, other, subset(given, "_weak"))
                output = torch.from_numpy(guide(strong.numpy(), weak.numpy(), float(given["scale"])))
            else:
                output = model.predict(scaled, modulations, subset(given))
            prediction = given["c_skip"] * given["x"] + given["c_out"] * output
            following = given["a"] * given["x"] + given["b"] * prediction + given["e"] * given["r"]
        check_reference(self.loaded, self.graph.name, prediction.numpy(), following.numpy())
        return OrderedDict(prediction=prediction.numpy(), next=following.numpy())


class LaneRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """A Polygraphy runner that runs one graph of a bundle on a lane of a backend."""

    def __init__(self, lane: Lane, name: str, graph: GraphFacts) -> None:
        super().__init__(name=name, prefix=name)
        self.lane = lane
        self.graph = graph

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _inputs(self.graph)

    def infer_impl(self, feed_dict: dict[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        memory = self.lane.memory
        rows = len(feed_dict["t" if self.graph.kind == "condition" else "x"])
        outputs = {
            tensor.name: memory.empty((rows, *(int(size) for size in tensor.shape[1:])), tensor.dtype)
            for tensor in self.graph.outputs
        }
        self.inference_time = 0.0
        run_once(self.lane, self.graph, feed_dict, outputs)
        return OrderedDict((name, memory.download(array)) for name, array in outputs.items())


def _inputs(graph: GraphFacts) -> TensorMetadata:
    metadata = TensorMetadata()
    for tensor in graph.inputs:
        metadata.add(tensor.name, np.dtype(tensor.dtype), tensor.shape)
    return metadata


def save_run(bundle: Bundle, graph: GraphFacts, folder: Path, feeds: Sequence[Feed], wanted: Any) -> tuple[str, ...]:
    """Write inputs and PyTorch's outputs of a graph to `folder` in Polygraphy's format.

    Returns the Polygraphy commands that repeat the comparison. There are none for a graph without
    an ONNX file, for BF16, and for half precision in the form for CUDA, as ONNX Runtime's CPU
    provider cannot run these.
    """
    inputs, outputs = folder / f"{graph.name}-inputs.json", folder / f"{graph.name}-outputs.json"
    save_json(feeds, str(inputs))
    RunResults([wanted]).save(str(outputs))
    manifest = bundle.manifest
    cpu = ("fp32",) if manifest.onnx_target == "onnxruntime-cuda" else ("fp32", "fp16")
    if graph.file is None or manifest.precision not in cpu:
        return ()
    words = ["polygraphy", "run", str(bundle.onnx(graph)), "--onnxrt"]
    words += ["--load-inputs", str(inputs), "--load-outputs", str(outputs)]
    if manifest.quantization is not None:
        least = manifest.quantization.gates.cosine
        words += ["--compare", "cosine_similarity", "--cosine-similarity-threshold", f"{least:g}"]
    else:
        tolerance = f"{BASES[manifest.precision].tolerance:g}"
        words += ["--atol", tolerance, "--rtol", tolerance]
    return (shlex.join(words),)
