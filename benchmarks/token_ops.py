"""Compare ONNX forms of gathering and scattering token rows on ONNX Runtime's CPU provider.

    python -m benchmarks.token_ops --output benchmarks/results/token_ops.json

All forms of a direction compute the same result. Gather takes K of N rows of (B, N, D) by (B, K)
indices, and scatter puts them back. The forms "given" read row numbers that were computed before,
as the graphs of a bundle do. All forms are timed in turn in one run. The figures are medians
over the rounds, with quartiles, and ratios to the elementwise form.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sg_export.models.subset import Subset

SHAPES = {"glyphs": (16, 64, 128), "S/2": (4, 256, 384), "XL/2": (1, 256, 1152)}
FORMS = {
    "gather": ("GatherElements", "GatherND batch_dims", "GatherND pairs", "Gather flat", "Gather given"),
    "scatter": ("ScatterElements", "ScatterND pairs", "ScatterND flat", "Gather inverse", "Gather given back"),
}
ROUNDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [row for direction in FORMS for name in SHAPES for row in measure(direction, name)]
    for row in rows:
        print("{direction:8} {shape:7} {form:20} {median_us:8.1f} us  {ratio:5.2f}".format(**row))
    if options.output:
        facts = {"onnxruntime": ort.__version__, "machine": platform.machine(), "threads": 1, "rounds": ROUNDS}
        options.output.write_text(json.dumps({"setup": facts, "rows": rows}, indent=1) + "\n")


def measure(direction: str, shape: str) -> list[dict[str, Any]]:
    """Time every form of `direction` at a shape. All results must be equal."""
    batch, tokens, width = SHAPES[shape]
    keep = tokens // 2
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((batch, tokens, width), dtype=np.float32),
        "keep": np.sort(rng.permuted(np.tile(np.arange(tokens), (batch, 1)), axis=1)[:, :keep], axis=1),
    }
    subset = Subset.of(torch.from_numpy(feeds["keep"]), tokens, masked=False)
    feeds |= {"given": subset.rows.numpy(), "given back": subset.restore.numpy()}
    if direction == "scatter":
        feeds["rows"] = rng.standard_normal((batch, keep, width), dtype=np.float32)
    sessions = {form: session(form, batch, tokens, width, keep) for form in FORMS[direction]}
    own = {
        form: {tensor.name: feeds[tensor.name] for tensor in runner.get_inputs()} for form, runner in sessions.items()
    }
    results = {form: runner.run(None, own[form])[0] for form, runner in sessions.items()}
    times: dict[str, list[float]] = {form: [] for form in sessions}
    for _ in range(ROUNDS):
        for form, runner in sessions.items():
            began = time.perf_counter()
            runner.run(None, own[form])
            times[form].append((time.perf_counter() - began) * 1e6)
    reference = FORMS[direction][0]
    for form, result in results.items():
        assert np.array_equal(result, results[reference]), form
    rows = []
    for form, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratio = median / statistics.median(times[reference])
        rows.append(
            {"direction": direction, "shape": shape, "form": form, "median_us": median, "quartiles_us": [low, high]}
            | {"ratio": ratio}
        )
    return rows


def session(form: str, batch: int, tokens: int, width: int, keep: int) -> ort.InferenceSession:
    """Open a session of one form with a symbolic batch size."""
    constants: dict[str, NDArray[np.int64]] = {}

    def const(name: str, value: object) -> str:
        constants[name] = np.asarray(value, dtype=np.int64)
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: int) -> NodeProto:
        return helper.make_node(kind, inputs, [output], **attributes)  # type: ignore[arg-type]  # its keywords

    expand = [
        node("Unsqueeze", ["keep", const("last", [2])], "column"),
        node("Expand", ["column", const("width", [1, 1, width])], "index"),
    ]
    images = [
        node("Shape", ["keep"], "batch1", start=0, end=1),
        node("Squeeze", ["batch1"], "batch"),
        node("Range", [const("zero", 0), "batch", const("one", 1)], "image"),
        node("Unsqueeze", ["image", const("axis1", [1])], "image_column"),
    ]
    pairs = [
        *images,
        node("Shape", ["keep"], "keep_shape"),
        node("Expand", ["image_column", "keep_shape"], "image_index"),
        node("Unsqueeze", ["image_index", const("pair", [2])], "left"),
        node("Unsqueeze", ["keep", "pair"], "right"),
        node("Concat", ["left", "right"], "pairs", axis=2),
    ]
    flat = [
        *images,
        node("Mul", ["image_column", const("tokens", tokens)], "offset"),
        node("Add", ["keep", "offset"], "flat_index"),
        node("Reshape", ["x", const("flat_shape", [-1, width])], "flat_x"),
    ]
    back = node("Reshape", ["flat_y", const("full_shape", [-1, tokens, width])], "y")
    graphs = {
        "GatherElements": [*expand, node("GatherElements", ["x", "index"], "y", axis=1)],
        "GatherND batch_dims": [expand[0], node("GatherND", ["x", "column"], "y", batch_dims=1)],
        "GatherND pairs": [*pairs, node("GatherND", ["x", "pairs"], "y")],
        "Gather flat": [*flat, node("Gather", ["flat_x", "flat_index"], "y", axis=0)],
        "Gather given": [
            node("Reshape", ["x", const("flat_shape", [-1, width])], "flat_x"),
            node("Gather", ["flat_x", "given"], "y", axis=0),
        ],
        "Gather given back": [
            node("Reshape", ["x", const("flat_shape", [-1, width])], "flat_x"),
            node("Reshape", ["rows", "flat_shape"], "flat_rows"),
            node("Concat", ["flat_x", "flat_rows"], "both", axis=0),
            node("Gather", ["both", "given back"], "y", axis=0),
        ],
        "ScatterElements": [*expand, node("ScatterElements", ["x", "index", "rows"], "y", axis=1)],
        "ScatterND pairs": [*pairs, node("ScatterND", ["x", "pairs", "rows"], "y")],
        "ScatterND flat": [
            *flat,
            node("Unsqueeze", ["flat_index", const("last", [2])], "flat_column"),
            node("ScatterND", ["flat_x", "flat_column", "rows"], "flat_y"),
            back,
        ],
        "Gather inverse": [
            node("Mul", ["keep", const("nothing", 0)], "zeros"),
            node("Add", ["zeros", const("places", np.arange(tokens, tokens + keep))], "sources"),
            node("Shape", ["keep"], "batch1", start=0, end=1),
            node("Concat", ["batch1", const("n", [tokens])], "grid_shape", axis=0),
            node("Expand", [const("identity", np.arange(tokens)[None]), "grid_shape"], "grid"),
            node("ScatterElements", ["grid", "keep", "sources"], "inverse", axis=1),
            node("Concat", ["x", "rows"], "both", axis=1),
            node("Unsqueeze", ["inverse", const("last", [2])], "inverse_column"),
            node("GatherND", ["both", "inverse_column"], "y", batch_dims=1),
        ],
    }
    shapes: dict[str, list[str | int]] = {"x": ["B", tokens, width], "keep": ["B", keep], "rows": ["B", keep, width]}
    shapes |= {"given": ["B", keep], "given back": ["B", tokens]}
    used = {name for own in graphs[form] for name in own.input}
    names = [name for name in shapes if name in used]
    kinds = {name: TensorProto.FLOAT if name in ("x", "rows") else TensorProto.INT64 for name in names}
    inputs = [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(graphs[form], form.replace(" ", "_"), inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
