"""Assembly of single graphs from the ONNX program of a network.

A program has the nodes of all graphs of a network. If a graph runs consecutive layers of one form,
it has one node `Layers` for them. Its inputs are the packed tokens, what the branches hold, and the
rows of their subsets. Each form has a body. A body is the nodes of one traced layer. It starts at
nodes `Inside`, one for each input of `Layers`, and ends at the output of the `Layer` that is listed
in `Program.bodies`.

`assemble` copies the nodes of one graph. It replaces each `Layers` by one copy of the body per
layer, with the names and the weights of that layer and its part of what the branches hold.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir
from onnx_ir.passes import common as passes

from sg_export.models.branches import Place

DOMAIN = "sg_export"
"""Domain of the operators `Layers` (attributes form, first, count) and `Inside` (place)."""

MODULE = "sg_export.module"
"""Metadata key of a node: name of the module that it comes from, as in the network."""


@dataclass(frozen=True)
class Layer:
    """The traced layer of a form.

    index: index of the layer.
    held: names of the inputs of `Layers` that branches hold, by their places among the inputs.
    output: output of the layer.
    """

    index: int
    held: Mapping[int, str]
    output: ir.Value


@dataclass(frozen=True)
class Program:
    """All graphs of a network in one model.

    model: the exported program.
    inputs: for each graph, its inputs by their names in the graph.
    outputs: for each graph, its outputs by their names in the graph.
    bodies: for each form, the traced layer.
    weight: function from a weight's name in the program to an initializer.
    layer_name: function from a layer's index to the name of its module.
    layer_inputs: function from a layer's index to its part of the held inputs, by name.
    """

    model: ir.Model
    inputs: Sequence[Mapping[str, ir.Value]]
    outputs: Sequence[Mapping[str, ir.Value]]
    bodies: Sequence[Layer]
    weight: Callable[[str], ir.Value]
    layer_name: Callable[[int], str]
    layer_inputs: Callable[[int], Mapping[str, Place]]

    @cached_property
    def names(self) -> Mapping[ir.Value, str]:
        """Name in its graph of each program input.

        A body may have been traced with the inputs of another graph.
        """
        return {value: name for inputs in self.inputs for name, value in inputs.items()}

    @cached_property
    def forms(self) -> "Sequence[_Body]":
        """Bodies of the forms, with their nodes."""
        return [_Body(layer, self.above([layer.output])) for layer in self.bodies]

    def above(self, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        """Return the nodes that compute these values, in the program's order, without `Inside`."""
        needed: set[ir.Node] = set()
        reached = [value.producer() for value in outputs]
        while reached:
            node = reached.pop()
            if node is not None and node not in needed and not is_marker(node, "Inside"):
                needed.add(node)
                reached += [value.producer() for value in node.inputs if value is not None]
        return [node for node in self.model.graph if node in needed]


def is_marker(node: ir.Node, kind: str) -> bool:
    """Whether a node is a `Layers` or an `Inside`."""
    return node.domain == DOMAIN and node.op_type == kind


def assemble(program: Program, number: int, name: str) -> ir.Model:
    """Return graph `number` of a program as a model, with the module of each node in `MODULE`."""
    copy = _Copy(program, name, {key: _like(value, key) for key, value in program.inputs[number].items()})
    outputs = program.outputs[number]
    values = copy.add(program.above(list(outputs.values())))
    for key, value in outputs.items():
        values[value].name = key
    graph = ir.Graph(
        list(copy.inputs.values()),
        [values[value] for value in outputs.values()],
        nodes=copy.nodes,
        initializers=[*copy.weights.values(), *copy.constants.values()],
        opset_imports={"": program.model.opset_imports[""]},
        name=name,
    )
    # Values that layers share, such as modulations with an added axis, were copied for each layer.
    model = ir.Model(graph, ir_version=program.model.ir_version, producer_name="sg-export")
    passes.CommonSubexpressionEliminationPass()(model)
    passes.NameFixPass()(model)
    return model


@dataclass(frozen=True)
class _Body:
    """One traced layer and its nodes in order, without `Inside`."""

    layer: Layer
    nodes: Sequence[ir.Node]

    @cached_property
    def entries(self) -> Mapping[ir.Value, int]:
        """For each output of an `Inside`, the index of the input of `Layers` that it represents."""
        read = [value for node in self.nodes for value in node.inputs if value is not None]
        sources = {value: value.producer() for value in read}
        return {
            value: source.attributes["place"].as_int()
            for value, source in sources.items()
            if source is not None and is_marker(source, "Inside")
        }

    def cuts(self, places: Mapping[str, Place]) -> dict[ir.Node, Place]:
        """Return the nodes that cut a layer's part out of the held inputs, with that part.

        places: the part that the copy takes of each held input, by name.
        """
        found: dict[ir.Node, Place] = {}
        for value, number in self.entries.items():
            place = places.get(self.layer.held.get(number, ""))
            if place is not None:
                direct = [use.node for use in value.uses()]
                axes = [node for node in direct if node.op_type == "Unsqueeze"]
                found |= dict.fromkeys([*direct, *(use.node for node in axes for use in node.outputs[0].uses())], place)
        return found


@dataclass
class _Copy:
    """The state of one graph's copy while it is made.

    program: the program that the graph is copied from.
    name: name of the graph.
    inputs: inputs of the copy by name.
    nodes: nodes of the copy, in order.
    weights: initializers of weights, by name.
    constants: initializers of constants, by type, shape and content.
    """

    program: Program
    name: str
    inputs: Mapping[str, ir.Value]
    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[str, ir.Value] = field(default_factory=dict)
    constants: dict[object, ir.Value] = field(default_factory=dict)

    def add(self, nodes: Sequence[ir.Node]) -> dict[ir.Value, ir.Value]:
        """Copy nodes of the graph and the layers of each `Layers`.

        Returns the copied values by their values in the program.
        """
        copies: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            if is_marker(node, "Layers"):
                copies[node.outputs[0]] = self._layers(node, self._inputs(node, copies))
            else:
                self._add(node, copies)
        return copies

    def _layers(self, node: ir.Node, values: Sequence[ir.Value | None]) -> ir.Value:
        """Copy the nodes of consecutive layers; return the output of the last layer."""
        form, first, count = (node.attributes[key].as_int() for key in ("form", "first", "count"))
        body, names = self.program.forms[form], self.program.layer_name
        tokens, *others = (value for value in values if value is not None)
        for index in range(first, first + count):
            copies = {value: (tokens, *others)[place] for value, place in body.entries.items()}
            renamed = (names(body.layer.index), names(index))
            cuts = body.cuts(self.program.layer_inputs(index))
            for inner in body.nodes:
                self._add(inner, copies, renamed, cuts.get(inner))
            tokens = copies[body.layer.output]
        return tokens

    def _inputs(
        self, node: ir.Node, copies: Mapping[ir.Value, ir.Value], renamed: tuple[str, str] | None = None
    ) -> list[ir.Value | None]:
        return [None if v is None else copies.get(v) or self._source(v, renamed) for v in node.inputs]

    def _add(
        self,
        node: ir.Node,
        copies: dict[ir.Value, ir.Value],
        renamed: tuple[str, str] | None = None,
        place: Place | None = None,
    ) -> None:
        """Copy one node.

        renamed: the module names of the traced layer and of the layer that the copy belongs to.
        place: the layer's part of a held input, if the node cuts it out.
        """
        size = self._size(node)
        inputs, attributes = size or (self._inputs(node, copies, renamed), list(node.attributes.values()))
        module = _renamed(node.metadata_props[MODULE], renamed)
        if renamed is not None and place is not None:
            module = renamed[1]
            if node.op_type == "Slice" and isinstance(place, slice):
                inputs[1:3] = (self._number(f"end.{end}", [end]) for end in (place.start, place.stop))
            elif node.op_type == "Gather" and isinstance(place, int):
                inputs[1] = self._number(f"entry.{place}", place)
        made = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes,
            num_outputs=len(node.outputs),
            metadata_props={MODULE: module},
        )
        self.nodes.append(made)
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name = old.name if renamed is None else f"{renamed[1]}/{old.name}"
            new.type, new.shape = old.type, old.shape and ir.Shape(list(old.shape))
            copies[old] = new

    def _size(self, node: ir.Node) -> tuple[list[ir.Value | None], list[ir.Attr]] | None:
        """Return the new inputs and attributes of a node that reads a symbolic size; else None.

        The copy reads the size from the first input of this graph that has it. PyTorch reads a size
        from any program input that has it, which may belong to another graph.
        """
        source, end = node.inputs[0] if node.inputs else None, node.attributes.get("end")
        if node.op_type != "Shape" or source is None or source not in self.program.names or end is None:
            return None
        assert source.shape is not None
        wanted = source.shape[end.as_int() - 1]
        found = (
            (value, axis)
            for value in self.inputs.values()
            for axis, dim in enumerate(value.shape or ())
            if dim == wanted
        )
        value, axis = next(found)
        return [value], [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]

    def _source(self, value: ir.Value, renamed: tuple[str, str] | None) -> ir.Value:
        """Return the copy of a value without a producer: an input, a weight or a constant.

        The name of a constant begins with the graph's name.
        """
        if value in self.program.names:
            return self.inputs[self.program.names[value]]
        name, tensor = str(value.name), value.const_value
        if tensor is not None:
            return self._constant(name, ir.tensor(tensor.numpy(), dtype=tensor.dtype))
        own = _renamed(name, renamed)
        if own not in self.weights:
            self.weights[own] = self.program.weight(own)
        return self.weights[own]

    def _number(self, name: str, number: int | list[int]) -> ir.Value:
        """Return a constant int64 for a place in a held input: () for a number, (1,) for a list."""
        return self._constant(name, ir.tensor(number, dtype=ir.DataType.INT64))

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the one initializer for all constants of this type, shape and content."""
        key = tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
        if key not in self.constants:
            tensor.name = f"{self.name}.{name}"
            self.constants[key] = ir.Value(
                name=tensor.name, shape=ir.Shape(key[1]), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.constants[key]


def _renamed(name: str, renamed: tuple[str, str] | None) -> str:
    """Return the name of a module or weight after the change of layers `renamed`, (old, new)."""
    if renamed is None or not f"{name}.".startswith(f"{renamed[0]}."):
        return name
    return renamed[1] + name[len(renamed[0]) :]


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape and ir.Shape(list(value.shape)))
