"""The form of a graph for ONNX Runtime's CUDA provider: few kernels, by operators that it fuses.

At one image, a step of DiT-XL/2 is bound by the number of its kernels. `lower_for_cuda` runs after
tracing, in place of `lower_attention`. The graph computes the same; `benchmarks/kernel_counts.py`
counts the kernels of both forms and names the kernel of every operator.

* Attention is `com.microsoft.MultiHeadAttention` with inputs (B, tokens, heads * size), one per
  branch. Branches with equal numbers of tokens are rows of one attention. Others are one sequence
  if it is short, with a bias that separates them. A bias per key is repeated for the queries,
  because the kernels take a bias per query and key.
* LayerNormalization takes the modulation as its scale and bias, which are (B, 1, D).
* With one image and one condition, `com.microsoft.SkipLayerNormalization` takes the residual sum
  and the bias before the gate as well. Its vectors have one axis, so it cannot serve more images.
* `com.microsoft.FastGelu` takes the bias of the linear layer.
* One Split gives up to 32 modulation vectors, not the vectors of one layer.
* In FP16 the tokens between the embedder and the last LayerNormalization are in FP16. Statistics
  of LayerNormalization are in FP32 in the kernels. In BF16 the tokens stay in FP32.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from sg_export.graph.half import HALF, cast
from sg_export.graph.nodes import insert, integers, remove_unused
from sg_export.graph.products import weight_of
from sg_export.graph.stamp import DOMAIN
from sg_runtime.errors import ExportError
from sg_runtime.manifest import Precision

T = TypeVar("T")

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

MOST_OUTPUTS = 32
"""Most outputs of a Split, and inputs of a Concat, whose addresses the kernel takes by value.

With more, ONNX Runtime copies the addresses from the host in every run.
"""

MOST_MASKED = 512
"""Most packed tokens of branches that attend as one sequence.

One sequence has two launches, a Split and an attention. Two branches have at least seven: two
Slices, two Splits, two attentions and a Concat. One sequence also computes the weights between
branches, which are 0. That is up to 0.04 of a block's multiply-adds at the width of XL/2, and 0.11
at that of S/2.
"""


def lower_for_cuda(graph: ir.Graph, precision: Precision) -> None:
    """Bring a traced FP32 graph to the form of ONNX Runtime's CUDA provider, in place.

    precision: type that `to_half` gives the products afterwards. Raises ExportError for an
    attention whose inputs do not come from (B, tokens, heads * size), or that has a bias and a
    symbolic number of queries.
    """
    _share_splits(graph)
    _fuse_attention(graph)
    _join_branches(graph, precision)
    _fuse_gelu(graph)
    _fuse_modulation(graph)
    if _batch(graph) == 1:
        _fuse_residuals(graph)
    if precision == "fp16":
        _start_in_half(graph)
    remove_unused(graph)
    if any(node.domain == MICROSOFT for node in graph):
        graph.opset_imports[MICROSOFT] = 1


def _batch(graph: ir.Graph) -> int | ir.SymbolicDim:
    return _dims(graph.inputs[0])[0]


def _share_splits(graph: ir.Graph) -> None:
    """Cut the modulations by one Slice and one Split for up to 32 vectors of one width."""
    for expanded in [node for node in graph if node.op_type == "Unsqueeze" and node.inputs[0] in graph.inputs]:
        source, cuts = expanded.outputs[0], _nodes(expanded.outputs[0], "Slice")
        vectors: list[tuple[int, int, ir.Value]] = []  # place, width
        for cut in cuts:
            for split in _nodes(cut.outputs[0], "Split"):
                start, width = _integers(cut.inputs[1])[0], _width(split.outputs[0])
                vectors += [(start + width * k, width, vector) for k, vector in enumerate(split.outputs)]
        vectors.sort(key=lambda vector: vector[0])
        name, batch = expanded.inputs[0].name if expanded.inputs[0] else "", _dims(source)[0]
        for width, run in itertools.groupby(vectors, key=lambda vector: vector[1]):
            for chunk in _chunks(list(run)):
                start, end = chunk[0][0], chunk[-1][0] + width
                ends = (integers(graph, start), integers(graph, end), integers(graph, 2))
                (part,) = insert(graph, cuts[0], "Slice", [source, *ends], [[batch, 1, end - start]])
                shapes = [[batch, 1, width]] * len(chunk)
                shared = insert(graph, cuts[0], "Split", [part], shapes, axis=2, num_outputs=len(chunk))
                part.name = f"{name}.{start}"
                for (place, _, vector), made in zip(chunk, shared, strict=True):
                    made.name = f"{name}.{place}.{width}"
                    vector.replace_all_uses_with(made)


def _fuse_attention(graph: ir.Graph) -> None:
    biases: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type == "Attention"]:
        query, key, value = (_tokens(graph, node, tensor) for tensor in node.inputs[:3])
        inputs: list[ir.Value | None] = [query, key, value]
        if len(node.inputs) > 3:
            inputs += [None, None, _bias(graph, node, biases)]
        heads = _dims(node.inputs[0])[1]
        (turned,) = _nodes(node.outputs[0], "Transpose")  # the exporter's form of the model's code
        (merged,) = _nodes(turned.outputs[0], "Reshape")
        (output,) = insert(
            graph,
            node,
            "MultiHeadAttention",
            inputs,
            [_dims(merged.outputs[0])],
            domain=MICROSOFT,
            num_heads=heads,
        )
        merged.outputs[0].replace_all_uses_with(output)
        graph.remove((merged, turned, node), safe=True)


def _bias(graph: ir.Graph, attention: ir.Node, made: dict[tuple[ir.Value, int], ir.Value]) -> ir.Value:
    """Return the bias of an attention, (B, 1, 1, keys), repeated for its queries.

    made: the biases that were repeated before, by the bias and the number of queries.
    """
    bias, queries = attention.inputs[3], _dims(attention.inputs[0])[2]
    assert bias is not None
    if not isinstance(queries, int):
        raise ExportError(
            f"attention {attention.outputs[0].name}: expected a fixed number of queries, as it has a bias, found "
            f"{queries}; build with `onnx_target` onnxruntime"
        )
    if (bias, queries) not in made:
        batch, _, _, keys = _dims(bias)
        shape = integers(graph, 1, 1, queries, 1)
        (made[bias, queries],) = insert(graph, attention, "Expand", [bias, shape], [[batch, 1, queries, keys]])
    return made[bias, queries]


def _tokens(graph: ir.Graph, attention: ir.Node, heads: ir.Value | None) -> ir.Value:
    """Return the tensor (B, tokens, heads * size) that an input of an attention is a view of.

    It is reshaped from (B, tokens, heads, size) if nothing else is: with all sizes fixed, PyTorch's
    exporter leaves out two reshapes that undo each other.
    """
    turned = None if heads is None else heads.producer()
    if turned is not None and turned.op_type == "Transpose":
        order, divided = turned.attributes["perm"].as_ints(), turned.inputs[0]
        reshaped = None if divided is None else divided.producer()
        if tuple(order) == (0, 2, 1, 3) and reshaped is not None and reshaped.op_type == "Reshape":
            tokens = reshaped.inputs[0]
            if tokens is not None and len(_dims(tokens)) == 3:
                return tokens
        if tuple(order) == (0, 2, 1, 3) and divided is not None and len(_dims(divided)) == 4:
            batch, count, *inner = _dims(divided)
            shape = [batch, count, math.prod(size for size in inner if isinstance(size, int))]
            return insert(graph, attention, "Reshape", [divided, integers(graph, 0, 0, -1)], [shape])[0]
    raise ExportError(
        f"attention {attention.outputs[0].name}: expected inputs that are views of (B, tokens, heads * size), found "
        f"{heads}; build with `onnx_target` onnxruntime"
    )


def _join_branches(graph: ir.Graph, precision: Precision) -> None:
    """Compute the attentions of all branches of a layer at once.

    Branches with equal numbers of tokens are rows of one attention: packed tokens (B, n * T, D) are
    the memory of (B * n, T, D), so no kernel cuts or joins them. Other branches become one sequence
    with a bias that gives the tokens of another branch the weight 0.
    """
    for concat in [node for node in graph if node.op_type == "Concat"]:
        attentions = [node for value in concat.inputs if (node := _source(value, "MultiHeadAttention")) is not None]
        found = _cut(attentions) if len(attentions) == len(concat.inputs) else None
        if found is None:
            continue
        packed, split, counts = found
        images, rows, width = _dims(packed)
        assert isinstance(rows, int)
        first, branches, equal = attentions[0], len(attentions), len(set(counts)) == 1
        if not equal and not _can_mask(rows, precision):
            continue
        batch, count, tokens, mask = images, rows, packed, list[ir.Value | None]()
        if equal:
            batch = images * branches if isinstance(images, int) else ir.SymbolicDim(f"{branches}*{images}")
            count = rows // branches
            shape = integers(graph, -1, count, _width(packed))
            (tokens,) = insert(graph, first, "Reshape", [packed, shape], [[batch, count, width]])
        else:
            mask = [None, None, _mask(graph, counts)]
        shapes = [[batch, count, _width(value)] for value in split.outputs]
        thirds = insert(graph, first, "Split", [tokens], shapes, axis=2, num_outputs=len(shapes))
        inputs = [*(thirds[value.index() or 0] for value in first.inputs if value is not None), *mask]
        heads = first.attributes["num_heads"].as_int()
        (output,) = insert(graph, first, "MultiHeadAttention", inputs, [shapes[-1]], domain=MICROSOFT, num_heads=heads)
        if equal:
            back = integers(graph, -1, rows, _width(output))
            (output,) = insert(graph, concat, "Reshape", [output, back], [_dims(concat.outputs[0])])
        concat.outputs[0].replace_all_uses_with(output)


def _can_mask(rows: int, precision: Precision) -> bool:
    """Whether packed branches of `rows` tokens attend as one sequence; see `MOST_MASKED`.

    The fused kernel that takes a bias needs 16 bytes in a row of it, times 4 in FP32.
    """
    return precision != "bf16" and rows % (16 if precision == "fp32" else 8) == 0 and rows <= MOST_MASKED


def _mask(graph: ir.Graph, counts: Sequence[int]) -> ir.Value:
    """Return the bias that separates branches with these numbers of tokens, made once.

    It is (1, 1, tokens, tokens): 0 within a branch, and the lowest FP16 elsewhere. The exponential
    of its difference to any score of a few thousand is 0 in FP32. An infinite bias would make NaN
    in kernels that see the keys of another branch first.
    """
    name = f"{graph.name}.branches.{'_'.join(map(str, counts))}"
    if name not in graph.initializers:
        branch = np.repeat(np.arange(len(counts)), counts)
        bias = np.where(branch[:, None] == branch, 0, np.finfo(np.float16).min).astype(np.float32)[None, None]
        tensor = ir.tensor(bias, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape(bias.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def _cut(attentions: Sequence[ir.Node]) -> tuple[ir.Value, ir.Node, list[int]] | None:
    """Return the packed tokens of these attentions, the Split of the first one, and their numbers.

    Returns None unless the inputs of each attention come from one Split of one Slice, and the
    Slices are consecutive parts of all tokens.
    """
    splits = [{value.producer() for value in node.inputs if value is not None} for node in attentions]
    cuts = [cut for (split, *others) in splits if split and not others and (cut := _source(split.inputs[0], "Slice"))]
    sources, starts = {cut.inputs[0] for cut in cuts}, [_integers(cut.inputs[1])[0] for cut in cuts]
    if len(cuts) != len(attentions) or len(sources) != 1:
        return None
    (packed,), (split,), counts = sources, splits[0], [_dims(cut.outputs[0])[1] for cut in cuts]
    assert packed is not None
    assert split is not None
    fixed = [count for count in counts if isinstance(count, int)]
    ends = list(itertools.accumulate(fixed))
    if len(fixed) != len(counts) or starts != [0, *ends[:-1]] or ends[-1] != _dims(packed)[1]:
        return None
    return packed, split, fixed


def _fuse_gelu(graph: ir.Graph) -> None:
    """Replace the sum with a bias and the tanh form of GELU by FastGelu."""
    for gelu in [node for node in graph if node.op_type == "Gelu"]:
        biased = _biased(gelu.inputs[0])
        form = gelu.attributes.get("approximate")
        if biased is None or form is None or form.as_string() != "tanh":
            continue
        (output,) = insert(graph, gelu, "FastGelu", biased, [_dims(gelu.outputs[0])], domain=MICROSOFT)
        gelu.outputs[0].replace_all_uses_with(output)


def _fuse_modulation(graph: ir.Graph) -> None:
    """Give each LayerNormalization the modulation that follows it.

    If the branches have own conditions, they are cut before the norm, which acts on rows.
    """
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        tokens, normed = norm.inputs[0], norm.outputs[0]
        assert tokens is not None
        cuts = _nodes(normed, "Slice")
        parts = [cut.outputs[0] for cut in cuts] if len(cuts) == len(normed.uses()) and cuts else [normed]
        found = [_modulation(part) for part in parts]
        if None in found:
            continue
        for part, modulation in zip(parts, found, strict=True):
            assert modulation is not None
            scale, shift, last = modulation
            before, source = last.producer(), tokens
            assert before is not None
            if part is not normed:
                cut = part.producer()
                assert cut is not None
                (source,) = insert(graph, before, "Slice", [tokens, *cut.inputs[1:]], [_dims(part)])
            attributes = {name: attribute.value for name, attribute in norm.attributes.items()}
            (output,) = insert(graph, before, norm.op_type, [source, scale, shift], [_dims(last)], **attributes)
            last.replace_all_uses_with(output)


def _modulation(normed: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return scale, shift and result if normed * scale + shift is the only use of `normed`."""
    scaled = _combined(normed, "Mul")
    shifted = None if scaled is None else _combined(scaled[1], "Add")
    if scaled is None or shifted is None or not (_is_vector(scaled[0], normed) and _is_vector(shifted[0], normed)):
        return None
    return scaled[0], shifted[0], shifted[1]


def _fuse_residuals(graph: ir.Graph) -> None:
    """Let SkipLayerNormalization take the residual sum before a modulated norm of one image.

    x + gate * (y + bias) is x + gate * y + gate * bias, and gate * bias is a vector.
    """
    found: dict[int, list[_Residual]] = defaultdict(list)
    for norm in [node for node in graph if node.op_type == "LayerNormalization" and len(node.inputs) == 3]:
        if (residual := _residual(norm)) is not None:
            found[_width(residual.product)].append(residual)
    for residuals in found.values():
        first = next(node for node in graph if any(node is residual.total for residual in residuals))
        biases: dict[ir.Node, ir.Value] = {}
        for chunk in _chunks([residual for residual in residuals if residual.bias is not None]):
            biases |= zip((residual.norm for residual in chunk), _gated_biases(graph, first, chunk), strict=True)
        for residual in residuals:
            norm, total = residual.norm, residual.total
            before = next(value for value in total.inputs if _source(value, "Mul") is not residual.gated)
            vectors = [*norm.inputs[1:], *([biases[norm]] if norm in biases else [])]
            flat = [_flat(graph, total, vector) for vector in vectors]
            shape = _dims(before)
            (update,) = insert(graph, total, "Mul", [residual.product, residual.gate], [shape])
            normed, _, _, tokens = insert(
                graph,
                total,
                "SkipLayerNormalization",
                [before, update, *flat],
                [shape, None, None, shape],
                domain=MICROSOFT,
                epsilon=norm.attributes["epsilon"].as_float(),
            )
            norm.outputs[0].replace_all_uses_with(normed)
            total.outputs[0].replace_all_uses_with(tokens)


@dataclass(frozen=True, slots=True)
class _Residual:
    """A residual sum before a norm: total = x + gate * (product + bias).

    gated: the node that multiplies by the gate.
    bias: None if there is none.
    """

    norm: ir.Node
    total: ir.Node
    gated: ir.Node
    gate: ir.Value
    product: ir.Value
    bias: ir.Value | None = None


def _residual(norm: ir.Node) -> _Residual | None:
    """Return the residual sum before a modulated norm; None if there is none with a gate."""
    tokens = norm.inputs[0]
    total = _source(tokens, "Add")
    if tokens is None or total is None or not all(_is_vector(vector, tokens) for vector in norm.inputs[1:]):
        return None
    for update in total.inputs:
        gated = _source(update, "Mul")
        if gated is None or len(gated.outputs[0].uses()) != 1:
            continue
        for product, gate in (gated.inputs, gated.inputs[::-1]):
            if product is None or gate is None or not _is_vector(gate, tokens):
                continue
            if (parts := _biased(product)) is not None:
                return _Residual(norm, total, gated, gate, *parts)
            if _is_product(product):
                return _Residual(norm, total, gated, gate, product)
    return None


def _gated_biases(graph: ir.Graph, before: ir.Node, residuals: Sequence[_Residual]) -> list[ir.Value]:
    """Return gate * bias of each residual, (1, 1, D). One kernel multiplies all of them."""
    gates, biases = [one.gate for one in residuals], [one.bias for one in residuals if one.bias is not None]
    count, width = len(residuals), _width(gates[0])
    tensors = [bias.const_value for bias in biases if bias.const_value is not None]
    name, shape = f"{graph.name}.{biases[0].name}.{count}", ir.Shape([count * width])
    joined = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors])),
        dtype=ir.DataType.FLOAT,
        shape=shape,
        name=name,
    )
    bias = ir.Value(name=name, shape=shape, type=ir.TensorType(joined.dtype), const_value=joined)
    graph.register_initializer(bias)
    (gate,) = insert(graph, before, "Concat", gates, [[1, 1, count * width]], axis=2)
    (product,) = insert(graph, before, "Mul", [gate, bias], [[1, 1, count * width]])
    parts = insert(graph, before, "Split", [product], [[1, 1, width]] * count, axis=2, num_outputs=count)
    for value, end in ((gate, "gates"), (product, "gated"), *((part, str(n)) for n, part in enumerate(parts))):
        value.name = f"{biases[0].name}/{end}"
    return parts


def _flat(graph: ir.Graph, before: ir.Node, vector: ir.Value | None) -> ir.Value:
    """Return a vector (1, 1, D) as (D,)."""
    assert vector is not None
    (flat,) = insert(graph, before, "Reshape", [vector, integers(graph, -1)], [[_width(vector)]])
    flat.name = f"{before.outputs[0].name}/{vector.name}"
    return flat


def _start_in_half(graph: ir.Graph) -> None:
    """Convert modulations and embedded tokens to FP16, and tokens back before the last norm.

    `to_half` then leaves everything between in FP16, as nothing there is in FP32.
    """
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    if not norms:  # a hoisted graph
        return
    half = HALF["fp16"]
    embedded = next(node for node in graph if weight_of(node) is not None).outputs[0]
    while (next_part := _embedding(embedded)) is not None:
        embedded = next_part
    last = norms[-1].inputs[0]
    assert last is not None
    modulations = [value for value in graph.inputs if str(value.name).startswith("modulations")]
    for norm in [node for node in graph if node.op_type == "Pow"]:
        _norm_in_fp32(graph, norm)
    for value in (embedded, *modulations):
        _convert(graph, value, half)
    if last is not embedded:
        norms[-1].replace_input_with(0, cast(graph, last, ir.DataType.FLOAT))


def _embedding(value: ir.Value) -> ir.Value | None:
    """Return the next value of the embedder: a sum with a constant, or another product."""
    added, uses = _combined(value, "Add"), list(value.uses())
    if added is not None and added[0].is_initializer():
        return added[1]
    return uses[0].node.outputs[0] if len(uses) == 1 and weight_of(uses[0].node) is not None else None


def _norm_in_fp32(graph: ir.Graph, squares: ir.Node) -> None:
    """Compute a norm of heads in FP32, from its squares to its quotient.

    ONNX Runtime fuses this form as well (SimplifiedLayerNormFusion).
    """
    heads = squares.inputs[0]
    assert heads is not None
    quotients = _nodes(heads, "Div")
    widened = cast(graph, heads, ir.DataType.FLOAT)
    for node in (squares, *quotients):
        node.replace_input_with(0, widened)
    for node in quotients:
        _convert(graph, node.outputs[0], HALF["fp16"])


def _convert(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Convert a value for all nodes that read it."""
    uses = list(value.uses())
    converted = cast(graph, value, dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, converted)


def _biased(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Return product and bias if a value is their sum and is used once."""
    added = _source(value, "Add")
    if added is None or value is None or len(value.uses()) != 1:
        return None
    for product, bias in (added.inputs, added.inputs[::-1]):
        if product is not None and bias is not None and bias.is_initializer() and _is_product(product):
            return product, bias
    return None


def _is_product(value: ir.Value) -> bool:
    """Whether a value is the product of something and a weight."""
    source = value.producer()
    return source is not None and weight_of(source) is not None


def _combined(value: ir.Value, operator: str) -> tuple[ir.Value, ir.Value] | None:
    """Return the other input and the output of the operator if it is the only use of `value`."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != operator:
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    return None if other is None else (other, uses[0].node.outputs[0])


def _is_vector(value: ir.Value | None, tokens: ir.Value) -> bool:
    """Whether a value is a modulation vector (B, 1, D) for tokens (B, R, D)."""
    if value is None or value.is_initializer() or value.shape is None or len(value.shape) != 3:
        return False
    batch, _, width = _dims(tokens)
    return _dims(value) == (batch, 1, width)


def _source(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the node that makes a value if it is this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _nodes(value: ir.Value, operator: str) -> list[ir.Node]:
    """Return the nodes of this operator that take `value` as their first input."""
    return [use.node for use in value.uses() if use.node.op_type == operator and use.idx == 0]


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + MOST_OUTPUTS] for start in range(0, len(items), MOST_OUTPUTS))


def _dims(value: ir.Value | None) -> tuple[int | ir.SymbolicDim, ...]:
    assert value is not None
    assert value.shape is not None
    return value.shape.dims


def _width(value: ir.Value) -> int:
    width = _dims(value)[-1]
    assert isinstance(width, int)
    return width


def _integers(value: ir.Value | None) -> list[int]:
    assert value is not None
    assert value.const_value is not None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]
