"""Polygraphy for the graphs of a bundle.

Runners compute them in PyTorch, and on a backend of the runtime. Saved inputs and outputs, with
commands, let Polygraphy's own command line repeat comparisons, also on another machine.
"""

import shlex
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from sg_export.loading import LoadedModel
from sg_export.options.types import BASES
from sg_export.parity.compare import Feed
from sg_export.parity.torch_backend import evaluate
from sg_runtime.backends import Lane
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import EngineFacts, GraphFacts, Manifest, Precision
from sg_runtime.run.evaluate import run_once


class TorchRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """A Polygraphy runner that computes one graph of the bundle in PyTorch; see `evaluate`."""

    def __init__(self, loaded: LoadedModel, graph: GraphFacts) -> None:
        super().__init__(name="pytorch", prefix="pytorch")
        self.loaded = loaded
        self.graph = graph

    def get_input_metadata_impl(self) -> TensorMetadata:
        return inputs_of_graph(self.graph)

    def infer_impl(self, feed_dict: dict[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        self.inference_time = 0.0
        return evaluate(self.loaded, self.graph, feed_dict)


class LaneRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """A Polygraphy runner that runs one graph of a bundle on a lane of a backend."""

    def __init__(self, lane: Lane, name: str, graph: GraphFacts) -> None:
        super().__init__(name=name, prefix=name)
        self.lane = lane
        self.graph = graph

    def get_input_metadata_impl(self) -> TensorMetadata:
        return inputs_of_graph(self.graph)

    def infer_impl(self, feed_dict: dict[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        memory = self.lane.memory
        rows = len(feed_dict[self.graph.inputs[0].name])
        outputs = {
            tensor.name: memory.empty((rows, *(int(size) for size in tensor.shape[1:])), tensor.storage)
            for tensor in self.graph.outputs
        }
        self.inference_time = 0.0
        run_once(self.lane, self.graph, feed_dict, outputs)
        return OrderedDict((name, memory.download(array)) for name, array in outputs.items())


def inputs_of_graph(graph: GraphFacts) -> TensorMetadata:
    """Return names, types and shapes of a graph's inputs."""
    metadata = TensorMetadata()
    for tensor in graph.inputs:
        metadata.add(tensor.name, tensor.storage, tensor.shape)
    return metadata


def save_data(folder: Path, name: str, graph: GraphFacts, feeds: Sequence[Feed], wanted: Any) -> tuple[str, ...]:
    """Write inputs of a graph and PyTorch's outputs to `folder` in Polygraphy's format.

    name: start of the names of the two files. Inputs in BF16, which NumPy lacks, are tensors of
    PyTorch. Returns the options that read the files.
    """
    bf16 = {tensor.name for tensor in graph.inputs if tensor.dtype == "bfloat16"}
    inputs, outputs = folder / f"{name}-inputs.json", folder / f"{name}-outputs.json"
    saved = [{key: _in_bf16(values) if key in bf16 else values for key, values in feed.items()} for feed in feeds]
    save_json(saved, str(inputs))
    RunResults([wanted]).save(str(outputs))
    return "--load-inputs", str(inputs), "--load-outputs", str(outputs)


def _in_bf16(bits: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def onnx_commands(
    bundle: Bundle, graph: GraphFacts, data: Sequence[str], precision: Precision | None = None
) -> tuple[str, ...]:
    """Return the Polygraphy commands that compare a graph's ONNX file with saved outputs.

    data: options of `save_data`. precision: precision of a part; None for the denoiser.

    There is none for a graph without an ONNX file, for BF16, and for half precision in the form for
    CUDA: ONNX Runtime's CPU provider cannot run these.
    """
    on_cpu = ("fp32",) if bundle.manifest.onnx_target == "onnxruntime-cuda" else ("fp32", "fp16")
    if graph.file is None or (precision or bundle.manifest.precision) not in on_cpu:
        return ()
    words = ["polygraphy", "run", str(bundle.onnx(graph)), "--onnxrt", *data, *_thresholds(bundle.manifest, precision)]
    return (shlex.join(words),)


def engine_command(
    bundle: Bundle, engine: EngineFacts, profile: int, data: Sequence[str], precision: Precision | None = None
) -> str:
    """Return the Polygraphy command that compares one profile of an engine with saved outputs.

    precision: precision of a part; None for the denoiser.

    Polygraphy runs TensorRT-RTX if a variable asks for it. Its default allocation does not fit
    engines that leave all allocation to the caller.
    """
    words = ["polygraphy", "run", str(bundle.file(engine.file)), "--model-type", "engine", "--trt"]
    words += ["--optimization-profile", str(profile), "--allocation-strategy", "profile"]
    command = shlex.join([*words, *data, *_thresholds(bundle.manifest, precision)])
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {command}" if engine.library == "tensorrt_rtx" else command


def _thresholds(manifest: Manifest, precision: Precision | None) -> list[str]:
    """Return Polygraphy's options for the gates of a precision, by default the denoiser's."""
    if precision is None and manifest.quantization is not None:
        least = manifest.quantization.gates.cosine
        return ["--compare", "cosine_similarity", "--cosine-similarity-threshold", f"{least:g}"]
    tolerance = f"{BASES[precision or manifest.precision].tolerance:g}"
    return ["--atol", tolerance, "--rtol", tolerance]
