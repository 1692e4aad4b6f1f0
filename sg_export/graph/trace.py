"""Tracing of a PyTorch module to ONNX graphs that name their weights as the checkpoint does.

All graphs of a network are exported as one program. In it, one layer of each form is traced. A form
is the kind of a layer together with the branches that it runs on. `sg_export.graph.stamp` copies
the traced layer to all layers of that form.

Weights are hidden from the exporter's optimizer, so no weight is folded into a constant. Therefore
the graphs of a model share all weights, and a model on PyTorch's meta device can be traced.
"""

import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from sg_export.graph.attention import lower_attention
from sg_export.graph.exported import finished, initializer_of, module_of, optimize_around_weights, quiet
from sg_export.graph.module import compute, random_inputs
from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs
from sg_export.graph.stamp import DOMAIN, MODULE, Layer, Program, assemble
from sg_export.graph.translate import translate, was_interrupt
from sg_export.models.branches import Branch, Branches
from sg_export.models.sparse import SparseModel
from sg_export.models.subset import Subset
from sg_runtime.errors import ExportError
from sg_runtime.manifest import ModelFacts, TensorFacts

_TRACED_SIZES = {"B": 2, "S": 3, "K": 2, "K_strong": 3, "K_weak": 2}
"""Sizes of the symbolic dimensions while tracing. PyTorch would treat 0 and 1 as constants."""


def trace(
    model: SparseModel,
    specs: Sequence[GraphSpec],
    facts: ModelFacts,
    batch: int | None,
    opset: int,
    *,
    symbolic_keep: bool = False,
    each_layer: bool = False,
    lower: Callable[[ir.Graph], None] = lower_attention,
) -> list[ir.Model]:
    """Trace the graphs `specs` of `model`, with inputs and outputs as in `sg_export.graph.spec`.

    batch: number of images; None for a symbolic dimension.
    symbolic_keep: see `graph_inputs`.
    each_layer: trace every layer separately. The graphs are the same, and it takes longer.
    lower: pass that brings a graph, with nodes `Attention`, to the form of its target, in place.

    The initializers are views of the model's parameters and have their names. The weight of a
    linear layer is stored transposed, as MatMul needs it, with ".T" after its name. Raises
    ExportError if PyTorch cannot export the model.
    """
    names = [spec.shared_name if symbolic_keep else spec.name for spec in specs]
    inputs = [graph_inputs(spec, facts, batch, symbolic_keep=symbolic_keep) for spec in specs]
    outputs = [graph_outputs(spec, facts, batch) for spec in specs]
    exported, layers = _export(model, specs, names, inputs, facts, opset, each_layer)
    starts, ends = iter(exported.graph.inputs), iter(exported.graph.outputs)
    program = Program(
        exported,
        inputs=[{tensor.name: next(starts) for tensor in tensors} for tensors in inputs],
        outputs=[{tensor.name: next(ends) for tensor in tensors} for tensors in outputs],
        bodies=[Layer(index, held, end) for (index, held), end in zip(layers, ends, strict=True)],
        weight=lambda name: initializer_of(model, name),
        layer_name=model.network.layer_name,
        layer_inputs=model.network.layer_inputs,
    )
    return [finished(assemble(program, number, name), outputs[number], lower) for number, name in enumerate(names)]


def _export(
    model: SparseModel,
    specs: Sequence[GraphSpec],
    names: Sequence[str],
    inputs: Sequence[Sequence[TensorFacts]],
    facts: ModelFacts,
    opset: int,
    each_layer: bool,
) -> tuple[ir.Model, list[tuple[int, dict[int, str]]]]:
    """Export all graphs as one program without weights; return it with `_State.traced`."""
    state = _State(model)
    program = _Program(state, specs, [[tensor.name for tensor in own] for own in inputs]).eval()
    every = list(itertools.chain.from_iterable(inputs))
    values, dynamic = _examples(inputs, facts, next(model.parameters()).device)
    try:
        with quiet(), torch.no_grad(), _cache_of(every), nullcontext() if each_layer else state.in_place_of_layers():
            exported = translate(torch.export.export(program, values, dynamic_shapes=(dynamic,)), opset)
    except Exception as error:  # PyTorch's exporter raises many kinds
        if was_interrupt(error):
            raise KeyboardInterrupt from None
        at = ", ".join(name for name, spec in zip(names, specs, strict=True) if state.at in (spec, None))
        raise ExportError(f"graph {at}: PyTorch {torch.__version__} cannot export it: {error}") from error
    optimize_around_weights(exported, program, _simplify)
    _name_dimensions(exported.graph, every)
    for node in exported.graph:
        node.metadata_props[MODULE] = module_of(node)
    return exported, state.traced


class _State:
    """A replacement for `SparseModel.run_layers` while tracing.

    It traces one layer of each form as a body, and replaces consecutive layers of one form by one
    node. A form is the kind of a layer, with the branches that the layer runs on: their numbers of
    tokens, what they hold and share, and whether they have a subset.

    bodies: outputs of the bodies.
    traced: for each body, the index of the traced layer, and the names of the inputs that are held
    tensors, by their place among the inputs.
    at: the graph that is being traced; None before and after tracing.
    """

    def __init__(self, model: SparseModel) -> None:
        self.model = model
        self.bodies: list[Tensor] = []
        self.traced: list[tuple[int, dict[int, str]]] = []
        self.at: GraphSpec | None = None
        self._forms: dict[Hashable, int] = {}

    def __call__(self, layers: range, tokens: Tensor, branches: Branches) -> Tensor:
        network, arguments = self.model.network, _Arguments(branches)
        for kind, run in itertools.groupby(layers, network.layer_kind):
            first, *others = run
            values = (tokens, *arguments.values)
            form = self._forms.setdefault((kind, *arguments.form), len(self._forms))
            if form == len(self.bodies):
                inside, *own = (
                    _marker("Inside", [value], value.shape, place=place) for place, value in enumerate(values)
                )
                self.traced.append((first, {1 + place: name for place, name in arguments.held.items()}))
                self.bodies.append(
                    network.layer(first, inside, arguments.branches(own).of(network.layer_inputs(first)))
                )
            shape = (*tokens.shape[:2], self.bodies[form].shape[2])
            tokens = _marker("Layers", values, shape, form=form, first=first, count=1 + len(others))
        return tokens

    @contextmanager
    def in_place_of_layers(self) -> Iterator[None]:
        """Make the model run its layers by this object within the block."""
        original, self.model.run_layers = self.model.run_layers, self
        try:
            yield
        finally:
            self.model.run_layers = original


class _Arguments:
    """The tensors of branches as arguments of a function.

    values: the tensors; what branches share is one of them.
    held: names of those that are held, by their place in `values`.
    form: a description of the branches that is equal if they differ only in the tensors' content.
    """

    def __init__(self, branches: Branches) -> None:
        self.values: list[Tensor] = []
        self.held: dict[int, str] = {}
        self._parts = [
            (
                branch.count,
                branch.subset and (self._place(branch.subset.rows), self._place(branch.subset.restore)),
                {name: self._place(tensor, name) for name, tensor in branch.held.items()},
            )
            for branch in branches
        ]
        self.form = tuple((str(count), subset, *held.items()) for count, subset, held in self._parts)

    def _place(self, tensor: Tensor, name: str | None = None) -> int:
        found = next((place for place, value in enumerate(self.values) if value is tensor), len(self.values))
        if found == len(self.values):
            self.values.append(tensor)
            self.held |= {} if name is None else {found: name}
        return found

    def branches(self, values: Sequence[Tensor]) -> Branches:
        """Return the branches with `values` in place of their tensors."""
        return Branches(
            Branch(
                count,
                subset and Subset(values[subset[0]], values[subset[1]]),
                {name: values[place] for name, place in held.items()},
            )
            for count, subset, held in self._parts
        )


class _Program(nn.Module):
    """All graphs as one module.

    Its arguments are the inputs of all graphs in order. It returns the outputs of all graphs in
    order, followed by the outputs of the bodies.
    """

    def __init__(self, state: _State, specs: Sequence[GraphSpec], names: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.model = state.model
        self._state, self._specs, self._names = state, specs, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        rest, outputs = iter(values), list[Tensor]()
        for spec, names in zip(self._specs, self._names, strict=True):
            self._state.at = spec
            outputs += compute(self.model, spec.kind, {name: next(rest) for name in names})
        self._state.at = None
        return (*outputs, *self._state.bodies)


def _marker(kind: str, values: Sequence[Tensor], shape: Sequence[int | torch.SymInt], **attributes: int) -> Tensor:
    """Add a node `Layers` or `Inside` to the graph; see `sg_export.graph.stamp`."""
    name, first = f"{DOMAIN}::{kind}", values[0]
    made = torch.onnx.ops.symbolic(name, values, {**attributes}, dtype=first.dtype, shape=shape, version=1)
    return made if made.device == first.device else made.to(first.device)  # PyTorch makes it on the CPU


def _examples(
    inputs: Sequence[Sequence[TensorFacts]], facts: ModelFacts, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Return values for the inputs of all graphs, and their symbolic dimensions."""
    generator = torch.Generator().manual_seed(0)
    dims = {name: torch.export.Dim(name, min=1) for name in _TRACED_SIZES}
    values = [
        random_inputs(tensors, facts, _TRACED_SIZES, generator)[tensor.name] for tensors in inputs for tensor in tensors
    ]
    every = itertools.chain.from_iterable(inputs)
    symbolic = ({i: dims[size] for i, size in enumerate(t.shape) if isinstance(size, str)} for t in every)
    return tuple(value.to(device) for value in values), tuple(symbolic)


_RULES = (
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.reshape_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
)
"""The rules of onnxscript that match in graphs of diffusion transformers.

Trying its other 40 rules at every node would take a third of the time of tracing.
"""


def _simplify(model: ir.Model) -> None:
    """Do what onnxscript's `optimize_ir` does, with the rules `_RULES` alone."""
    passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewrite(model, _RULES)
    for last in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        last(model)


def _name_dimensions(graph: ir.Graph, inputs: Sequence[TensorFacts]) -> None:
    """Rename the tracer's symbolic dimensions to those of `inputs`, in all values.

    Terms and factors are sorted: PyTorch's order depends on what else the program has.
    """
    names: dict[str, str] = {}
    for value, facts in zip(graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for dim, wanted in zip(value.shape, facts.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(wanted, str):
                names[str(dim.value)] = wanted

    def named(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int):
            return dim
        name = dim.value and re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.value)
        name = name and re.sub(r"\w+(\*\w+)+", lambda match: "*".join(sorted(match[0].split("*"))), name)
        return name and " + ".join(sorted(name.split(" + ")))

    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([named(dim) for dim in value.shape])


def _cache_of(inputs: Sequence[TensorFacts]) -> AbstractContextManager[None]:
    """Return a block without PyTorch's cache of output shapes if step graphs have symbolic sizes.

    A third of the time of tracing such graphs was spent in the cache: it proves for each symbolic
    size that an entry fits.
    """
    from torch._dynamo import config  # the export imports it anyway, in a second

    sizes = {size for tensor in inputs for size in tensor.shape if isinstance(size, str)}
    return config.patch(fake_tensor_cache_enabled=sizes <= {"S"})  # type: ignore[no-any-return]
