"""What PyTorch's exporter leaves, and how its graphs are finished.

The exported module is one whose attribute `model.network` holds the weights. Their names in a graph
are those in that network.
"""

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

from sg_export.graph.stamp import MODULE
from sg_runtime.manifest import TensorFacts

_MODEL_PREFIX, _NETWORK_PREFIX = "model.", "network."
_WEIGHT_PREFIX = _MODEL_PREFIX + _NETWORK_PREFIX
_TRANSPOSED = ".T"
_TOLERANCE = 1e-7


def optimize_around_weights(
    model: ir.Model, program: nn.Module, optimize: Callable[[ir.Model], object] = optimizer.optimize_ir
) -> None:
    """Optimize a model with its weights as values of unknown content.

    program: the exported module. Tensors that its code makes are constants, and no weights.
    optimize: the optimizer.

    Each Transpose of a weight, or of a weight made a matrix, is then replaced by a value with ".T"
    after the weight's name.
    """
    graph = model.graph
    known = {name for kind in (program.named_parameters, program.named_buffers) for name, _ in kind()}
    weights: list[ir.Value] = []
    for name, initializer in list(graph.initializers.items()):
        if name in known:
            initializer.const_value = None
            del graph.initializers[name]
            weights.append(initializer)
    small = _small_constants(graph)
    graph.inputs.extend([*weights, *small])
    optimize(model)
    for value, tensor in small.items():
        graph.inputs.remove(value)
        value.const_value = tensor
    for weight in weights:
        graph.inputs.remove(weight)
        weight.name = str(weight.name).removeprefix(_WEIGHT_PREFIX)
        transposed = ir.Value(name=f"{weight.name}{_TRANSPOSED}")
        matrices = [use.node for use in weight.uses() if use.node.op_type == "Reshape"]
        for value in (*(node.outputs[0] for node in matrices), weight):
            for node in [use.node for use in value.uses() if use.node.op_type == "Transpose"]:
                node.outputs[0].replace_all_uses_with(transposed)
                graph.remove(node, safe=True)
        graph.remove([node for node in matrices if not node.outputs[0].uses()], safe=True)


def _small_constants(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Replace constants that onnxscript takes for 0 by values of unknown content.

    Its rules compare a constant with 0 with a tolerance of 1e-8, so they drop the sum with an
    epsilon of 1e-15, and 0 / 0 remains. Returns the constants by their new values.
    """
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for node in [node for node in graph if node.op_type == "Constant"]:
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size != 1:
            continue
        if 0 < abs(float(tensor.numpy().item())) < _TOLERANCE:
            value = ir.Value(
                name=node.outputs[0].name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
            )
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
            found[value] = tensor
    return found


def initializer_of(model: nn.Module, name: str) -> ir.Value:
    """Return a parameter or buffer of the network as an initializer.

    If its name ends in ".T", it is made a matrix and transposed when it is read.
    """
    values, turned = _tensor(model, name.removesuffix(_TRANSPOSED)), name.endswith(_TRANSPOSED)
    tensor = ir.tensor_adapters.TorchTensor(values.flatten(1) if turned else values)
    made: ir.TensorProtocol = tensor
    shape = ir.Shape(tensor.shape.numpy())
    if turned:
        shape = ir.Shape(reversed(tensor.shape.numpy()))
        made = ir.LazyTensor(lambda: ir.tensor(tensor.numpy().T), dtype=tensor.dtype, shape=shape)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=made)


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, own = f"{_NETWORK_PREFIX}{name}".rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), own)
    return found.detach()


def module_of(node: ir.Node) -> str:
    """Return the name in the network of the module that a node comes from."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
    module = f"{scopes[-2]}." if len(scopes) > 1 else "."
    return module.removeprefix(_MODEL_PREFIX).removeprefix(_NETWORK_PREFIX).rstrip(".")


def finished(model: ir.Model, outputs: Sequence[TensorFacts], lower: Callable[[ir.Graph], None]) -> ir.Model:
    """Lower a graph to its target, name its nodes and set its output shapes; return its model.

    The name of a node is its module and its operator, as blocks.3.attn/Softmax. Backends and
    Polygraphy report these names.
    """
    lower(model.graph)
    used: Counter[str] = Counter()
    for node in model.graph:
        name = f"{node.metadata_props.get(MODULE, '')}/{node.op_type}"
        node.name = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1
    for value, facts in zip(model.graph.outputs, outputs, strict=True):
        value.shape = ir.Shape(facts.shape)
    passes.ClearMetadataAndDocStringPass()(model)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages of PyTorch within the block.

    They are warnings about its own deprecated parts and about torchvision, which is not needed, and
    logs of an exception, which the caller reports.
    """
    wanted = {"torch.onnx": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
    levels = {name: logging.getLogger(name).level for name in wanted}
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
