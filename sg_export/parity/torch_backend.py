"""A backend that computes the graphs of a bundle with its networks in PyTorch, on the CPU."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sg_export.graph.check import check_reference
from sg_export.graph.module import branch_inputs
from sg_export.loading import LoadedModel
from sg_runtime.backends.base import Call, CallSequence
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import HostMemory
from sg_runtime.guidance import guide
from sg_runtime.manifest import GraphFacts, TensorFacts
from sg_runtime.vocabulary import HOISTED


def evaluate(
    loaded: LoadedModel, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]]
) -> OrderedDict[str, NDArray[Any]]:
    """Compute the outputs of a graph, in FP32, with the network that it was traced from.

    A guided graph is computed in two separate, complete passes. Raises CheckpointError if a value
    is not finite.
    """
    given = {tensor.name: from_storage(tensor, feeds[tensor.name]) for tensor in graph.inputs}
    model = loaded.model
    with torch.no_grad():
        if graph.hoisted:
            outputs = dict(zip(HOISTED[graph.kind], model.hoist(graph.kind, given), strict=True))
            check_reference(loaded.source, graph.name, *(value.numpy() for value in outputs.values()))
            return OrderedDict((name, value.numpy()) for name, value in outputs.items())
        scaled = given["c_in"] * given["x"]
        output, *weak = (model.predict(scaled, one.held, one.keep) for one in branch_inputs(graph.kind, given))
        if weak:
            output = torch.from_numpy(guide(output.numpy(), weak[0].numpy(), float(given["scale"])))
        prediction = given["c_skip"] * given["x"] + given["c_out"] * output
        following = given["a"] * given["x"] + given["b"] * prediction + given["e"] * given["r"]
    check_reference(loaded.source, graph.name, prediction.numpy(), following.numpy())
    return OrderedDict(prediction=prediction.numpy(), next=following.numpy())


def from_storage(tensor: TensorFacts, values: Any) -> Tensor:
    """Return an array of this tensor's storage type as a tensor; floats become FP32."""
    found = torch.from_numpy(np.asarray(values))
    if tensor.dtype == "int64":
        return found
    return (found.view(torch.bfloat16) if tensor.dtype == "bfloat16" else found).float()


def to_storage(tensor: TensorFacts, values: Tensor) -> NDArray[Any]:
    """Return a tensor as an array of this tensor's storage type."""
    if tensor.dtype == "bfloat16":
        return values.bfloat16().view(torch.uint16).numpy()
    return values.numpy().astype(tensor.storage)


class TorchBackend:
    """PyTorch in place of a bundle's graphs; see `sg_runtime.backends.base.Backend`."""

    def __init__(self, network: Callable[[GraphFacts], LoadedModel], batch: int) -> None:
        """Set up the backend. network: returns the network of a graph. batch: images of a run."""
        self.name = "pytorch"
        self.lanes: int | None = None
        self.batches: tuple[int, ...] | None = (batch,)
        self._network = network

    def lane(self) -> "TorchLane":
        return TorchLane(self._network)

    def at(self, bundle: Bundle) -> "TorchBackend":
        return self  # `network` knows the networks of all graphs

    def keep(self) -> None:
        pass


class TorchLane:
    """A lane of a TorchBackend."""

    def __init__(self, network: Callable[[GraphFacts], LoadedModel]) -> None:
        self.memory: Any = HostMemory()
        self._network = network

    def enter(self) -> None:
        pass

    def release(self) -> None:
        pass

    def bind(
        self, graph: GraphFacts, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *, fixed: bool = False
    ) -> Call:
        def call() -> None:
            found = evaluate(self._network(graph), graph, inputs)
            for tensor in graph.outputs:
                if tensor.name in outputs:
                    np.copyto(outputs[tensor.name], to_storage(tensor, torch.from_numpy(found[tensor.name])))

        return call

    def sequence(self, calls: Sequence[Call]) -> CallSequence:
        return CallSequence(calls)
