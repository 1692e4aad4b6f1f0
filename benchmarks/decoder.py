r"""Compare the flux VAE's decoder in ONNX Runtime with diffusers, on this CPU.

    python -m benchmarks.decoder --output benchmarks/results/decoder.json

Needs the extra `diffusers`. The decoder has the published shapes, with 16 channels and 8 pixels per
latent, and random weights. Both decode the same latents to one picture, in FP32, in processes of
their own that take turns. Each process decodes once before it is timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.prx_models import published, without_memory
from sg_export.cost.count import count_cost
from sg_export.graph.attention import lower_attention
from sg_export.graph.check import check_graph
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs
from sg_export.graph.trace_part import trace_part
from sg_export.graph.weights import write_graphs
from sg_export.parity.distances import relative_l2
from sg_export.parts.decode import load_decoder
from sg_runtime.host import peak_memory

FLUX: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Arguments of diffusers' `AutoencoderKL` in the published folders."""

BACKENDS = ("diffusers", "onnxruntime")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=int, default=512, help="height and width of the picture, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each process")
    parser.add_argument("--runs", type=int, default=2, help="timed pictures of a turn")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("BACKEND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        print(json.dumps(run(options.run[0], Path(options.run[1]), options.runs)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        content = measure(options.picture, options.rounds, options.runs, Path(scratch))
    print(json.dumps(content, indent=1))
    if options.output:
        described = {"machine": machine("torch", "diffusers", "onnxruntime"), **content}
        options.output.write_text(json.dumps(described, indent=1) + "\n")


def measure(picture: int, rounds: int, runs: int, scratch: Path) -> dict[str, Any]:
    """Write decoder, graph and latents to `scratch`, then measure both backends in turns."""
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(**FLUX).save_pretrained(scratch / "vae")
    _, facts = without_memory(published(picture, depth=4))
    loaded, spec = load_decoder(scratch / "vae", facts), GraphSpec("decode", network="decoder")
    inputs = graph_inputs(spec, facts, 1)
    began = time.monotonic()
    model = trace_part(loaded.module, "decode", inputs, graph_outputs(spec, facts, 1), DEFAULT_OPSET, lower_attention)
    traced, cost = time.monotonic() - began, count_cost(model.graph)
    (path,) = write_graphs([model], scratch, "weights.bin")
    check_graph(path)
    np.save(scratch / "latents.npy", torch.randn(1, *facts.latent).numpy())
    command = [sys.executable, "-m", "benchmarks.decoder", "--runs", str(runs), "--run"]
    found: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
    for _ in range(rounds):
        for backend in BACKENDS:
            made = subprocess.run([*command, backend, str(scratch)], check=True, stdout=subprocess.PIPE, text=True)
            found[backend].append(json.loads(made.stdout))
    pictures = [np.load(scratch / f"{backend}.npy") for backend in BACKENDS]
    seconds = {
        backend: statistics.median(second for turn in turns for second in turn["seconds"])
        for backend, turns in found.items()
    }
    return {
        "picture": [picture, picture],
        "parameters": sum(tensor.numel() for tensor in loaded.module.parameters()),
        "linear_gmacs": round(cost.linear_macs / 1e9, 1),
        "attention_gmacs": round(cost.attention_macs / 1e9, 1),
        "trace_seconds": round(traced, 1),
        "relative_distance": relative_l2(pictures[1], pictures[0]),
        "seconds": {
            backend: [second for turn in turns for second in turn["seconds"]] for backend, turns in found.items()
        },
        "median_seconds": seconds,
        "ratio": round(seconds["diffusers"] / seconds["onnxruntime"], 2),
        "open_seconds": {
            backend: statistics.median(turn["open"] for turn in turns) for backend, turns in found.items()
        },
        "memory_gb": {backend: max(turn["memory_gb"] for turn in turns) for backend, turns in found.items()},
    }


def run(backend: str, folder: Path, runs: int) -> dict[str, Any]:
    """Decode the latents in `folder` with one backend; return its times and its peak memory."""
    latents = np.load(folder / "latents.npy")
    began = time.monotonic()
    decode = _diffusers(folder) if backend == "diffusers" else _onnxruntime(folder)
    opened = time.monotonic() - began
    picture, seconds = decode(latents), []
    for _ in range(runs):
        began = time.monotonic()
        picture = decode(latents)
        seconds.append(round(time.monotonic() - began, 3))
    np.save(folder / f"{backend}.npy", picture)
    return {"open": round(opened, 2), "seconds": seconds, "memory_gb": round(peak_memory() / 1e9, 2)}


def _diffusers(folder: Path) -> Callable[[Any], Any]:
    import diffusers

    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()

    def decode(latents: Any) -> Any:
        with torch.no_grad():
            unscaled = torch.from_numpy(latents) / vae.config.scaling_factor + vae.config.shift_factor
            return vae.decode(unscaled, return_dict=False)[0].numpy()

    return decode


def _onnxruntime(folder: Path) -> Callable[[Any], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "decode.onnx", providers=["CPUExecutionProvider"])
    return lambda latents: session.run(None, {"latents": latents})[0]


if __name__ == "__main__":
    main()
