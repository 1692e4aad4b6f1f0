"""Graphs with layers traced once and stamped, compared with graphs with every layer traced."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import onnx_ir as ir
import pytest
from onnxscript import optimizer
from text import SmallPRX

from sg_export.graph import trace as trace_module
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.loading import LoadedModel
from sg_export.models import maskdit
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_runtime.manifest import Level, Route

CONFIG = DiTConfig(image_size=6, patch=2, channels=2, width=12, depth=4, heads=2, mlp_width=20, num_classes=3)
SHORT, SHORTEST = replace(CONFIG, depth=3), replace(CONFIG, depth=2)
ALL, MOST, SOME = Level(0.0, 9), Level(0.2, 7), Level(0.5, 4)
KINDS = (
    GraphSpec("condition"),
    GraphSpec("dense", (ALL,)),
    GraphSpec("sparse", (SOME,)),
    GraphSpec("guided", (ALL, SOME)),
    GraphSpec("guided", (MOST, SOME), null_weak=True),
)


def meaning(graph: ir.Graph) -> tuple[Counter[Hashable], list[Hashable]]:
    """Return the nodes and the outputs in a form independent of names and of the order of nodes.

    A node is identified by its computation. A value is identified by the name of its graph input,
    the name of its weight, the content of its constant, or the node that makes it.
    """
    known: dict[ir.Value | None, Hashable] = {None: None}
    nodes: list[Hashable] = []
    for value in graph.inputs:
        known[value] = ("input", value.name, value.dtype, str(value.shape))
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        is_weight = not name.startswith(f"{graph.name}.")
        known[value] = (name, str(value.shape)) if is_weight else (str(tensor.dtype), str(tensor.numpy().tolist()))
    for node in graph:
        attributes = tuple(sorted((key, str(attribute.value)) for key, attribute in node.attributes.items()))
        shapes = tuple((value.dtype, str(value.shape)) for value in node.outputs)
        # A hash describes everything before a value; a full description would grow with the depth.
        inputs = tuple(hash(known[value]) for value in node.inputs)
        if node.op_type == "Add":  # PyTorch adds token counts in either order
            inputs = tuple(sorted(inputs))
        made = (node.domain, node.op_type, attributes, inputs, shapes)
        nodes.append(made)
        known |= {value: (hash(made), place) for place, value in enumerate(node.outputs)}
    return Counter(nodes), [known[value] for value in graph.outputs]


@pytest.mark.slow
@pytest.mark.usefixtures("undecomposed")
@pytest.mark.parametrize(
    ("network", "config", "route", "specs", "batch", "symbolic_keep"),
    [
        pytest.param(DiT, SHORT, Route(0, 1), KINDS, 1, False, id="tread"),
        pytest.param(DiT, SHORTEST, Route(0, 1), KINDS[4:], None, True, id="tread symbolic"),
        pytest.param(MaskDiT, SHORTEST, Route(0, 2), KINDS[2:4], 2, False, id="maskdit"),
        pytest.param(MaskDiT, SHORTEST, Route(0, 2), KINDS[2:3], None, True, id="maskdit symbolic"),
        pytest.param(SmallPRX, SHORT, Route(1, 1), KINDS[2::2], 1, False, id="text"),
    ],
)
def test_trace_of_each_kind_of_layer_once_equals_the_trace_of_all(
    network: type[DiT],
    config: DiTConfig,
    route: Route,
    specs: Sequence[GraphSpec],
    batch: int | None,
    symbolic_keep: bool,
    make_model: Callable[..., LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(maskdit, "DECODER_DEPTH", 3)  # one block of each kind, and one to stamp
    loaded = make_model(network, config, route)
    rest = (loaded.facts, batch, DEFAULT_OPSET)
    stamped = trace(loaded.model, specs, *rest, symbolic_keep=symbolic_keep)
    monkeypatch.setattr(trace_module, "_simplify", optimizer.optimize_ir)  # with all rules of onnxscript
    whole = trace(loaded.model, specs, *rest, symbolic_keep=symbolic_keep, each_layer=True)
    for found, expected in zip(stamped, whole, strict=True):
        assert found.graph.name == expected.graph.name
        assert meaning(found.graph) == meaning(expected.graph)
        assert set(weights_of(found.graph)) == set(weights_of(expected.graph))
        names = [node.name for node in found.graph]
        assert len(set(names)) == len(names)


def weights_of(graph: ir.Graph) -> list[str]:
    return [name for name in graph.initializers if not name.startswith(f"{graph.name}.")]


@pytest.mark.usefixtures("undecomposed")
def test_trace_names_nodes_of_stamped_layers_by_their_modules(make_model: Callable[..., LoadedModel]) -> None:
    loaded = make_model(DiT, CONFIG, Route(1, 2))
    (model,) = trace(loaded.model, KINDS[3:4], loaded.facts, 1, DEFAULT_OPSET)
    for index in range(CONFIG.depth):
        own = [node for node in model.graph if str(node.name).startswith(f"blocks.{index}.attn.qkv/MatMul")]
        assert [str(node.inputs[1].name) for node in own if node.inputs[1]] == [f"blocks.{index}.attn.qkv.weight.T"]
        (cut,) = (node for node in model.graph if node.name == f"blocks.{index}/Slice")
        ends = [value.const_value.numpy().item() for value in cut.inputs[1:3] if value and value.const_value]
        assert ends == [index * 6 * CONFIG.width, (index + 1) * 6 * CONFIG.width]


def test_trace_gives_stamped_layers_their_text(make_model: Callable[..., LoadedModel]) -> None:
    loaded = make_model(SmallPRX, SHORTEST, Route(0, 1))
    (model,) = trace(loaded.model, [replace(KINDS[3], null_weak=True)], loaded.facts, None, DEFAULT_OPSET)
    assert not {"Shape", "Range"} & {node.op_type for node in model.graph}
    readers = {value.name: [use.node for use in value.uses()] for value in model.graph.inputs}
    for name in ("text_keys", "text_values", "text_keys_weak", "text_values_weak"):
        entries = [node.inputs[1].const_value.numpy().item() for node in readers[name] if node.inputs[1]]  # type: ignore[union-attr]
        assert [node.op_type for node in readers[name]] == ["Gather"] * SHORTEST.depth
        assert entries == [*range(SHORTEST.depth)]
        assert [str(node.name).partition("/")[0] for node in readers[name]] == [f"blocks.{k}" for k in entries]
