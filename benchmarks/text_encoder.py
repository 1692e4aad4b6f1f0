r"""Measure export and TensorRT-RTX engine of a text encoder of T5Gemma-2B's shapes.

    python -m benchmarks.text_encoder --layers 2 4 8 --output benchmarks/results/text_encoder.json

Needs no GPU, but the extra `diffusers`. The published encoder has 26 layers of width 2304 and a
vocabulary of 256,000; weights are random, in BF16 as published, and texts have 256 tokens. For each
number of layers the folder of a pipeline is written. One process reads it, traces the encoder,
writes its graph in BF16 and compares it with PyTorch, as `sg-export build` does. Another one builds
the engine, for SM 8.9. The row of a failed build says why.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.prx_models import published, without_memory
from sg_engines.child import build_in_child
from sg_engines.trt import EngineRecipe
from sg_export.cost.count import count_cost
from sg_export.graph.attention import lower_attention
from sg_export.graph.check import check_graph, check_part_parity
from sg_export.graph.half import to_half
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs
from sg_export.graph.trace_part import trace_part
from sg_export.graph.weights import write_graphs
from sg_export.parts.text import ENCODERS, load_text
from sg_runtime.errors import EngineError
from sg_runtime.host import peak_memory

LAYERS = 26
"""Layers of the published encoder."""


@dataclass(frozen=True, slots=True)
class Row:
    """One encoder.

    layers: number of layers.
    parameters: number of its weights.
    weights_gb: their size in BF16.
    trace_seconds: time to trace its graph.
    compile_seconds: time from the folder to the graph, without the comparison with PyTorch.
    compile_memory_gb: peak memory of the compiler up to there.
    parity: relative distance of the graph in BF16, emulated, to PyTorch in FP32.
    parity_seconds, parity_memory_gb: time of the comparison, and the compiler's peak with it.
    linear_gmacs: multiply-adds of its layers for one prompt, in billions.
    build_seconds, build_memory_gb: time and peak memory of the engine's build; None if it failed.
    engine_gb: size of the engine.
    failure: why the build failed; None if it did not.
    """

    layers: int
    parameters: int
    weights_gb: float
    trace_seconds: float
    compile_seconds: float
    compile_memory_gb: float
    parity: float
    parity_seconds: float
    parity_memory_gb: float
    linear_gmacs: float
    build_seconds: float | None
    build_memory_gb: float | None
    engine_gb: float | None
    failure: str | None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, LAYERS])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compile", type=Path, nargs=2, metavar=("FOLDER", "GRAPHS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile:
        print(json.dumps(compile_part(*options.compile)))
        return
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measure(layers, Path(scratch)))
        print(rows[-1], flush=True)
        if options.output:
            content: dict[str, object] = {"machine": machine("torch", "transformers", "onnx", "tensorrt-rtx")}
            content["rows"] = [asdict(row) for row in rows]
            options.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(layers: int, scratch: Path) -> Row:
    """Compile and build an encoder, each in a process of its own."""
    folder, graphs, engine = scratch / "pipeline", scratch / "graphs", scratch / "text.engine"
    parameters = write_folder(layers, folder)
    command = [sys.executable, "-m", "benchmarks.text_encoder", "--compile", str(folder), str(graphs)]
    compiled = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    build: dict[str, Any] = dict.fromkeys(("build_seconds", "build_memory_gb", "engine_gb", "failure"))
    try:
        figures = build_in_child(
            "tensorrt_rtx", graphs / "text.onnx", EngineRecipe(({},), (89,)), engine, lambda *_: None
        )
        build["build_seconds"] = round(figures.seconds, 1)
        build["build_memory_gb"] = round(figures.memory_bytes / 1e9, 2)
        build["engine_gb"] = round(engine.stat().st_size / 1e9, 2)
    except EngineError as error:
        build["failure"] = str(error)
    return Row(layers=layers, parameters=parameters, weights_gb=round(parameters * 2 / 1e9, 2), **compiled, **build)


def write_folder(layers: int, folder: Path) -> int:
    """Write the folder of a pipeline, without its network; return the number of the weights."""
    import transformers
    from safetensors.torch import save_file

    config = transformers.models.t5gemma.T5GemmaModuleConfig(num_hidden_layers=layers).to_dict()
    entries = {"text_encoder": ["prx", "T5GemmaEncoder"], "tokenizer": ["transformers", "GemmaTokenizerFast"]}
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PRXPipeline", **entries}))
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    transformers.GemmaTokenizerFast().save_pretrained(folder / "tokenizer")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ENCODERS["T5GemmaEncoder"].made(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "text_encoder" / "model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def compile_part(folder: Path, graphs: Path) -> dict[str, float]:
    """Compile the encoder in `folder` and return what `Row` has of it."""
    _, facts = without_memory(published(512, depth=4))
    began = time.monotonic()
    loaded, spec = load_text(folder, facts), GraphSpec("text", network="text_encoder")
    inputs = graph_inputs(spec, facts, 1)
    tracing = time.monotonic()
    model = trace_part(loaded.module, "text", inputs, graph_outputs(spec, facts, 1), DEFAULT_OPSET, lower_attention)
    traced = time.monotonic()
    to_half(model.graph, "bf16", ())
    macs = count_cost(model.graph).linear_macs
    graphs.mkdir()
    (path,) = write_graphs([model], graphs, "weights.bin")
    check_graph(path)
    written, memory = time.monotonic(), peak_memory()
    del model
    parity = check_part_parity(loaded.source, loaded.module, inputs, path, "bf16")
    assert parity is not None
    return {
        "trace_seconds": round(traced - tracing, 1),
        "compile_seconds": round(written - began, 1),
        "compile_memory_gb": round(memory / 1e9, 2),
        "parity": float(f"{parity:.3g}"),
        "parity_seconds": round(time.monotonic() - written, 1),
        "parity_memory_gb": round(peak_memory() / 1e9, 2),
        "linear_gmacs": round(macs / 1e9, 1),
    }


if __name__ == "__main__":
    main()
