"""The ONNX graphs: signatures, operators, weights, and agreement with PyTorch."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from sg_export.graph.check import check_graph
from sg_export.graph.module import GraphModule, random_inputs
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel, load_model
from sg_runtime.manifest import Level

FULL, MOST, HALF = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8)
SPECS = {
    spec.name: spec
    for spec in (
        GraphSpec("condition"),
        GraphSpec("dense", (FULL,)),
        GraphSpec("sparse", (MOST,)),
        GraphSpec("sparse", (HALF,)),
        GraphSpec("guided", (FULL, HALF)),
        GraphSpec("guided", (MOST, HALF)),
        GraphSpec("guided", (MOST, HALF), null_weak=True),
    )
}
STEPS = [name for name in SPECS if name != "condition"]
GUIDED = [name for name in SPECS if name.startswith("guided")]
OUTPUTS = ("prediction", "next")

# The design's bound for every graph. FP32 sums in another order differed by 3e-7 when measured.
BOUND = 1e-5


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def paths(tiny_bundle: Path, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of the tiny bundle's graphs by name, and of a graph whose weak branch has no class."""
    null = trace(loaded.model, [SPECS["guided-12-8-null"]], loaded.facts, None, DEFAULT_OPSET)
    more = write(null, tmp_path_factory.mktemp("null"))
    return {path.stem: path for path in [*sorted((tiny_bundle / "graphs").glob("*.onnx")), *more]}


@pytest.fixture(scope="module")
def models(paths: dict[str, Path]) -> dict[str, ModelProto]:
    """The graphs of `paths`, without their weights."""
    return {name: onnx.load(path, load_external_data=False) for name, path in paths.items()}


@pytest.fixture
def traced(loaded: LoadedModel, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that traces one graph, writes it and returns its path."""

    def make(spec: GraphSpec, batch: int | None = None, opset: int = DEFAULT_OPSET) -> Path:
        return write(trace(loaded.model, [spec], loaded.facts, batch, opset), tmp_path)[0]

    return make


def write(models: list[ir.Model], folder: Path) -> list[Path]:
    return write_graphs(models, folder, "weights.bin")


def values_of(spec: GraphSpec, loaded: LoadedModel, rows: int, batch: int | None = None) -> dict[str, torch.Tensor]:
    """Return random inputs of a graph; the modulations are of random times and classes."""
    generator = torch.Generator().manual_seed(rows)
    sizes = {"B": rows, "S": rows}
    inputs = graph_inputs(spec, loaded.facts, batch)
    values = random_inputs(inputs, loaded.facts, sizes, generator)
    if spec.kind == "condition":
        return values | {"class": torch.arange(rows) % 6}
    t, classes = torch.rand(rows, generator=generator), torch.arange(rows) % 6
    values["modulations"] = loaded.model.hoist("condition", {"t": t, "class": classes})[0]
    if spec.null_weak:
        values["modulations_weak"] = loaded.model.hoist("condition", {"t": t, "class": torch.full((rows,), 5)})[0]
    return values


def run(path: Path, values: dict[str, torch.Tensor]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {name: value.numpy() for name, value in values.items()})
    return outputs


def error(path: Path, spec: GraphSpec, loaded: LoadedModel, rows: int, batch: int | None = None) -> float:
    """Return the relative L2 distance between ONNX Runtime and PyTorch for the worst output."""
    values = values_of(spec, loaded, rows, batch)
    wanted = GraphModule(loaded.model, spec, list(values))(*values.values())
    pairs = list(zip(run(path, values), wanted if isinstance(wanted, tuple) else (wanted,), strict=True))
    assert all(found.shape == w.shape for found, w in pairs)
    return max(float(np.linalg.norm(found - w.numpy()) / np.linalg.norm(w.numpy())) for found, w in pairs)


def signature(graph: GraphProto) -> list[tuple[str, int, list[int | str]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in [*graph.input, *graph.output]
    ]


def expected_signature(spec: GraphSpec, loaded: LoadedModel, batch: int | None) -> list[tuple[str, int, list[Any]]]:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    tensors = [*graph_inputs(spec, loaded.facts, batch), *graph_outputs(spec, loaded.facts, batch)]
    return [(tensor.name, types[tensor.dtype], list(tensor.shape)) for tensor in tensors]


def makers(graph: GraphProto) -> dict[str, NodeProto]:
    """Return a mapping of each value's name to the node that makes it."""
    return {name: node for node in graph.node for name in node.output}


def readers(graph: GraphProto, name: str) -> list[NodeProto]:
    return [node for node in graph.node if name in node.input]


def below(graph: GraphProto, name: str) -> Iterator[NodeProto]:
    """Yield the nodes that depend on a value, each once."""
    reached = {name}
    for node in graph.node:  # in order of computation
        if reached & set(node.input):
            reached |= set(node.output)
            yield node


@pytest.mark.parametrize("name", SPECS)
def test_trace_signature_is_the_designs(name: str, models: dict[str, ModelProto], loaded: LoadedModel) -> None:
    assert signature(models[name].graph) == expected_signature(SPECS[name], loaded, None)


def test_trace_names_are_the_tensors_of_every_graph(models: dict[str, ModelProto]) -> None:
    assert set(models) == set(SPECS)
    inputs = {name: [value.name for value in model.graph.input] for name, model in models.items()}
    tail = ["c_in", "c_skip", "c_out", "a", "b", "e", "r"]
    kept = ["rows_strong", "restore_strong", "rows_weak", "restore_weak"]
    assert inputs == {
        "condition": ["t", "class"],
        "dense": ["x", "modulations", *tail],
        "sparse-12": ["x", "modulations", "rows", "restore", *tail],
        "sparse-8": ["x", "modulations", "rows", "restore", *tail],
        "guided-16-8": ["x", "modulations", "rows_weak", "restore_weak", "scale", *tail],
        "guided-12-8": ["x", "modulations", *kept, "scale", *tail],
        "guided-12-8-null": ["x", "modulations", "modulations_weak", *kept, "scale", *tail],
    }
    outputs = {name: tuple(value.name for value in model.graph.output) for name, model in models.items()}
    assert outputs == {name: OUTPUTS if name in STEPS else ("modulations",) for name in models}


@pytest.mark.parametrize("name", STEPS)
def test_trace_step_holds_no_conditioning_weights(name: str, models: dict[str, ModelProto], tiny: Any) -> None:
    weights = {tensor.name.removesuffix(".T") for tensor in models[name].graph.initializer} & set(tiny.state())
    expected = {key for key in tiny.state() if not re.match(r"[ty]_embedder\.|.*adaLN_modulation", key)}
    assert weights == expected
    assert not any(re.search("embedder.mlp|embedding|adaLN", t.name) for t in models[name].graph.initializer)


def test_trace_condition_holds_the_conditioning_weights_alone(models: dict[str, ModelProto], tiny: Any) -> None:
    weights = {tensor.name for tensor in models["condition"].graph.initializer} & set(tiny.state())
    assert weights == {key for key in tiny.state() if re.match(r"[ty]_embedder\.|.*adaLN_modulation", key)}
    own = [t for t in models["condition"].graph.initializer if t.name.startswith("condition.")]
    assert len(own) + len(weights) == len(models["condition"].graph.initializer)
    assert max(np.prod(tensor.dims) for tensor in own) == 128  # the frequencies


@pytest.mark.parametrize("name", SPECS)
def test_trace_operators_are_plain(name: str, models: dict[str, ModelProto]) -> None:
    model = models[name]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", DEFAULT_OPSET)]
    assert not model.functions
    kinds = {node.op_type for node in model.graph.node}
    assert all(node.domain == "" for node in model.graph.node)
    assert not any(
        attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute
    )
    assert not kinds & {"If", "Loop", "Scan", "Identity", "Constant", "Dropout", "Bernoulli", "Multinomial"}
    assert not {kind for kind in kinds if kind.startswith(("Random", "Sequence", "Cast"))}


@pytest.mark.parametrize("name", SPECS)
def test_trace_reads_no_shape(name: str, models: dict[str, ModelProto]) -> None:
    kinds = {node.op_type for node in models[name].graph.node}
    assert not kinds & {"Shape", "Range", "Expand", "GatherND", "ScatterND", "Where", "NonZero"}


def attentions(spec: GraphSpec) -> int:
    """Return the number of attentions: one block is before the route, one in it, one after it.

    Branches with the same condition share the first block.
    """
    return 3 if spec.kind != "guided" else 6 if spec.null_weak else 5


@pytest.mark.parametrize("name", STEPS)
def test_trace_attention_is_the_pattern_of_fused_kernels(name: str, models: dict[str, ModelProto]) -> None:
    graph = models[name].graph
    made, constants = makers(graph), {tensor.name for tensor in graph.initializer}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == attentions(SPECS[name])
    for softmax in softmaxes:
        scores = made[softmax.input[0]]
        (product,) = readers(graph, softmax.output[0])
        assert (scores.op_type, product.op_type) == ("MatMul", "MatMul")
        query, key, value = made[scores.input[0]], made[scores.input[1]], made[product.input[1]]
        assert (query.op_type, key.op_type, value.op_type) == ("Mul", "Transpose", "Transpose")
        assert query.input[1] in constants
        parts = [made[made[query.input[0]].input[0]], made[key.input[0]], made[value.input[0]]]
        assert [part.op_type for part in parts] == ["Reshape"] * 3
        assert all(part.input[1] in constants for part in parts)
        assert {made[part.input[0]].op_type for part in parts} == {"Split"}


@pytest.mark.parametrize("name", STEPS)
def test_trace_reads_every_weight_once(name: str, models: dict[str, ModelProto], tiny: Any) -> None:
    graph, state = models[name].graph, tiny.state()
    reads = Counter(value for node in graph.node for value in node.input)
    weights = [tensor.name for tensor in graph.initializer if tensor.name.removesuffix(".T") in state]
    assert {reads[weight] for weight in weights} == {1}
    # Twice in each of three blocks, and once before the head: all branches at the same time.
    assert sum(node.op_type == "LayerNormalization" for node in graph.node) == 7


@pytest.mark.parametrize("name", GUIDED)
def test_trace_guided_combines_where_it_is_first_exact(name: str, models: dict[str, ModelProto]) -> None:
    graph = models[name].graph
    made = makers(graph)
    (scaled,) = readers(graph, "scale")
    difference = made[next(value for value in scaled.input if value != "scale")]
    (total,) = readers(graph, scaled.output[0])
    assert (scaled.op_type, difference.op_type, total.op_type) == ("Mul", "Sub", "Add")
    halves = made[difference.input[0]]
    assert (halves.op_type, list(halves.output)) == ("Split", list(difference.input))
    assert set(total.input) == {scaled.output[0], halves.output[1]}
    # With one condition, the branches combine after the last normalisation. With two, they combine
    # after both are modulated and joined.
    assert made[halves.input[0]].op_type == ("Concat" if SPECS[name].null_weak else "LayerNormalization")
    after = Counter(node.op_type for node in below(graph, "scale"))
    assert after["LayerNormalization"] == after["Softmax"] == 0
    assert after["MatMul"] == 1


@pytest.mark.parametrize("name", STEPS)
def test_trace_step_ends_with_the_update(name: str, models: dict[str, ModelProto]) -> None:
    graph = models[name].graph
    made = makers(graph)

    def terms(value: str) -> list[set[str]]:
        """Return a sum of multiplications as the set of factors of each."""
        node = made[value]
        if node.op_type == "Add":
            return [factors for part in node.input for factors in terms(part)]
        assert node.op_type == "Mul"
        return [set(node.input)]

    *linear, memory = terms("next")
    assert linear == [{"a", "x"}, {"b", "prediction"}]
    assert memory == {"e", "r"}
    skip, (*network,) = terms("prediction")
    assert skip == {"c_skip", "x"}
    assert "c_out" in network
    assert [set(node.input) for node in readers(graph, "c_in")] == [{"c_in", "x"}]


def test_trace_initializers_lie_in_one_file(tiny_bundle: Path) -> None:
    size = (tiny_bundle / "graphs/weights.bin").stat().st_size
    places: dict[str, tuple[int, int]] = {}
    for path in (tiny_bundle / "graphs").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries["location"] == "weights.bin"
                place = int(entries["offset"]), int(entries["length"])
                assert places.setdefault(tensor.name, place) == place
            else:
                assert np.prod(tensor.dims) * 4 < 1024
    ends = sorted((start, start + length) for start, length in places.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    # Every weight is stored once; the remaining bytes are alignment.
    assert sum(length for _, length in places.values()) <= ends[-1][1] <= size
    assert size < 1.1 * sum(length for _, length in places.values())


def test_trace_weights_are_the_checkpoints(tiny: Any, tiny_bundle: Path) -> None:
    state = tiny.state()
    found = {}
    for path in (tiny_bundle / "graphs").glob("*.onnx"):
        for tensor in onnx.load(path).graph.initializer:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    for name, tensor in state.items():
        stored = found[f"{name}.T"].T if f"{name}.T" in found else found[name]
        assert np.array_equal(stored.reshape(tensor.shape), tensor.numpy()), name


@pytest.mark.parametrize("name", SPECS)
def test_trace_leaves_no_trace_of_this_machine(name: str, paths: dict[str, Path], tiny_checkpoint: Path) -> None:
    content = paths[name].read_bytes()
    for word in (b".py", b"site-packages", b"/home", b"/root", b"/tmp", str(tiny_checkpoint.parent).encode(), b"File "):
        assert word not in content
    model = onnx.load_from_string(content)
    assert (model.producer_name, model.producer_version, model.doc_string) == ("sg-export", "", "")
    assert not model.metadata_props
    assert not model.graph.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.parametrize("name", SPECS)
def test_trace_passes_checker_and_strict_shape_inference(name: str, paths: dict[str, Path], tmp_path: Path) -> None:
    path = paths[name]
    check_graph(path)
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes_path(str(path), str(tmp_path / "inferred.onnx"), strict_mode=True)
    model = onnx.load(path, load_external_data=False)
    known = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    for node in model.graph.node:
        for output in node.output:
            assert known[output].type.tensor_type.HasField("shape"), output


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("name", SPECS)
def test_trace_with_symbolic_batch_equals_pytorch(
    name: str, rows: int, paths: dict[str, Path], loaded: LoadedModel
) -> None:
    assert error(paths[name], SPECS[name], loaded, rows) <= BOUND


# With 130 images, the exporter folds the indices of a sparse graph into constants of the external
# file.
@pytest.mark.parametrize(("batch", "names"), [(1, ["guided-12-8"]), (130, ["sparse-8", "guided-12-8"])])
def test_trace_with_fixed_batch_equals_pytorch(
    batch: int, names: list[str], loaded: LoadedModel, tmp_path: Path
) -> None:
    specs = [SPECS[name] for name in names]
    written = write(trace(loaded.model, specs, loaded.facts, batch, DEFAULT_OPSET), tmp_path)
    for path, spec in zip(written, specs, strict=True):
        check_graph(path)
        model = onnx.load(path, load_external_data=False)
        assert signature(model.graph) == expected_signature(spec, loaded, batch)
        assert not {"Shape", "Range", "Expand"} & {node.op_type for node in model.graph.node}
        assert error(path, spec, loaded, batch, batch) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opset", "name"), [(21, "condition"), (21, "sparse-8"), (22, "condition"), (22, "guided-12-8")]
)
def test_trace_of_later_opset_equals_pytorch(
    opset: int, name: str, loaded: LoadedModel, traced: Callable[..., Path]
) -> None:
    path = traced(SPECS[name], opset=opset)
    check_graph(path)
    model = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert error(path, SPECS[name], loaded, 3) <= BOUND
