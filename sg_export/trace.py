"""From a PyTorch module to an ONNX graph that names its weights as the checkpoint does.

Weights are hidden from the exporter's optimizer, so none is folded into a constant: the graphs of one model share all
of them, and a model on PyTorch's meta device can be traced without any.
"""

import ast
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset20 as op
from onnxscript import optimizer

from sg_export import graphs
from sg_export.graphs import GraphSpec
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import ExportError
from sg_runtime.manifest import ModelFacts, TensorFacts

DEFAULT_OPSET = 20
OPSETS = (20, 21, 22)
"""From 20 on Gelu is one operator; from 23 on PyTorch emits an Attention that not every backend builds in FP32."""
_MODEL_PREFIX, _NETWORK_PREFIX = "model.", "network."
_WEIGHT_PREFIX = _MODEL_PREFIX + _NETWORK_PREFIX
_TRACED_SIZES = {"B": 2, "S": 3, "K": 2, "K_strong": 3, "K_weak": 2}
"""Sizes of the symbolic dimensions while tracing: not 0 or 1, which PyTorch would take for constants."""


def trace(
    model: SparseModel,
    spec: GraphSpec,
    facts: ModelFacts,
    batch: int | None,
    opset: int,
    *,
    symbolic_keep: bool = False,
) -> ir.Model:
    """Trace the graph `spec` of `model` with the tensors of `sg_export.graphs`.

    The initializers view the model's parameters, whose names they bear; a linear layer's weight is stored transposed,
    as MatMul takes it, under its name with ".T" added. Raises ExportError where PyTorch cannot export the model.
    """
    inputs = graphs.inputs(spec, facts, batch, symbolic_keep=symbolic_keep)
    outputs, name = graphs.outputs(spec, facts, batch), spec.shared_name if symbolic_keep else spec.name
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    values = tuple(graphs.example(tensor, facts.tokens, _TRACED_SIZES, generator).to(device) for tensor in inputs)
    dims = {name: torch.export.Dim(name, min=1) for name in _TRACED_SIZES}
    dynamic = tuple({i: dims[size] for i, size in enumerate(t.shape) if isinstance(size, str)} for t in inputs)
    module = graphs.GraphModule(model, spec, [tensor.name for tensor in inputs]).eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, values, dynamic_shapes=(dynamic,))
            exported = torch.onnx.export(
                program,
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=[tensor.name for tensor in inputs],
                output_names=[tensor.name for tensor in outputs],
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
            )
    except Exception as error:  # PyTorch's exporter raises many kinds
        if _was_interrupt(error):
            raise KeyboardInterrupt from None
        raise ExportError(f"graph {name}: PyTorch {torch.__version__} cannot export it: {error}") from error
    assert exported is not None
    graph_model = exported.model
    graph_model.graph.name = name
    _optimize_around_weights(graph_model)
    _name_nodes(graph_model.graph)
    passes.ClearMetadataAndDocStringPass()(graph_model)
    _name_dimensions(graph_model.graph, inputs, outputs)
    graph_model.producer_name, graph_model.producer_version = "sg-export", None
    return graph_model


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query keyᵀ / √size) value as MatMul, Softmax, MatMul: the form whose fused kernels backends look for.

    PyTorch's own translation reads the shape of the keys at run time, which hides the pattern. The query is scaled,
    not the product, which keeps half-precision products in range.
    """
    if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
        raise ExportError("attention: expected the plain form of scaled_dot_product_attention")
    size = query.shape[-1]
    factor = op.Constant(value_float=size**-0.5)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _optimize_around_weights(model: ir.Model) -> None:
    """Optimize with the weights as inputs; then make them initializers again, those of linear layers transposed.

    The other initializers get the graph's name in theirs, since a name stands for one tensor in all graphs.
    """
    graph = model.graph
    weights: dict[ir.Value, ir.TensorProtocol] = {}
    for name, initializer in list(graph.initializers.items()):
        if name.startswith(_WEIGHT_PREFIX):
            assert initializer.const_value is not None
            weights[initializer] = initializer.const_value
            initializer.const_value = None
            del graph.initializers[name]
            graph.inputs.append(initializer)
    optimizer.optimize_ir(model)
    for constant in list(graph.initializers.values()):  # the exporter numbers them anew in every graph
        constant.name = f"{graph.name}.{constant.name}"
    for initializer, tensor in weights.items():
        graph.inputs.remove(initializer)
        initializer.name = str(initializer.name).removeprefix(_WEIGHT_PREFIX)
        for node in [use.node for use in initializer.uses() if use.node.op_type == "Transpose"]:
            _replace_transposed(node, initializer, tensor)
        if initializer.uses():
            initializer.const_value = tensor
            graph.register_initializer(initializer)


def _replace_transposed(node: ir.Node, weight: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Replace Transpose(weight) by an initializer that holds the transposed weight, made when it is written."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    output = node.outputs[0]
    name = f"{weight.name}.T"
    transposed = graph.initializers.get(name)
    if transposed is None:
        shape = ir.Shape(reversed(tensor.shape.numpy()))
        lazy = ir.LazyTensor(lambda: ir.tensor(tensor.numpy().T), dtype=tensor.dtype, shape=shape, name=name)
        transposed = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
        graph.register_initializer(transposed)
    output.replace_all_uses_with(transposed)
    graph.remove(node, safe=True)


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node by the module that it comes from and what it does, as blocks.3.attn/Softmax.

    Backends and Polygraphy tell of nodes by their names.
    """
    used: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        module = scopes[-2] if len(scopes) > 1 else ""
        name = f"{f'{module}.'.removeprefix(_MODEL_PREFIX).removeprefix(_NETWORK_PREFIX).rstrip('.')}/{node.op_type}"
        node.name = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1


def _name_dimensions(graph: ir.Graph, inputs: Sequence[TensorFacts], outputs: Sequence[TensorFacts]) -> None:
    """Give the tracer's symbolic dimensions the names of the graph's tensors, everywhere, in sums too."""
    names: dict[str, str] = {}
    for value, facts in zip(graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for dim, wanted in zip(value.shape, facts.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(wanted, str):
                names[str(dim.value)] = wanted

    def named(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int):
            return dim
        return dim.value and re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.value)

    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([named(dim) for dim in value.shape])
    for value, facts in zip(graph.outputs, outputs, strict=True):
        value.shape = ir.Shape(facts.shape)


def _was_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C came as PyTorch read an argument, which it then tells as the text of a TypeError."""
    while error is not None:
        if "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings on its own deprecated parts, and on torchvision, which is not needed.

    And without its log of an exception, which the one who catches that tells.
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
