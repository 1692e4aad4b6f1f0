"""Measure the time of each stage, the memory and the size of a complete FP32 `build`.

    python -m benchmarks.export_size --model XL/2 --output benchmarks/results/export_xl.json

The model is glyphs or a real size with random weights. The random checkpoint is written as in
upstream (a .pt with `ema_state_dict`). The command line then builds it in a separate process. The
peak memory is the operating system's figure for that process. Needs three times the weights' size
on disk.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
import onnxruntime
import torch

from sg_export.models.dit import DiT, DiTConfig
from sg_runtime.bundle import Bundle

SHAPES = {"S/2": (384, 12, 6), "B/2": (768, 12, 12), "L/2": (1024, 24, 16), "XL/2": (1152, 28, 16)}
"""Width, depth and number of heads of each size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["glyphs", *SHAPES], default="XL/2")
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(options.model, options.sparsity, Path(scratch))
    print(json.dumps(figures, indent=1))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


def measure(name: str, sparsity: str, folder: Path) -> dict[str, object]:
    """Build a model of the named size in `folder`. Return the measured time, memory and sizes."""
    command = [sys.executable, "-m", "sg_export", "build"]
    if name != "glyphs":
        width, depth, heads = SHAPES[name]
        write_checkpoint(DiTConfig(32, 2, 4, width, depth, heads, 4 * width, 1000), folder / "random.pt")
        command += [str(folder / "random.pt"), "--route", f"2-{depth - 4}", "--prediction", "flow"]
    command += ["--sparsity", sparsity, "--output", str(folder / "bundle")]
    stages: dict[str, float] = {}
    began = last = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    stage = "start"
    for line in process.stderr:
        now = time.monotonic()
        stages[stage] = now - last
        stage, last = re.sub(r"^\[.*?\] ", "", line.strip()).replace(str(folder) + os.sep, ""), now
    if process.wait() != 0:
        raise SystemExit(f"build failed: {stage}")
    stages[stage] = time.monotonic() - last
    manifest = Bundle.open(folder / "bundle", verify_hashes=False).manifest
    return {
        "model": name if name == "glyphs" else f"DiT-{name}",
        "parameters": manifest.model.parameters,
        "seconds": round(time.monotonic() - began, 1),
        "stages_seconds": {stage: round(value, 1) for stage, value in stages.items()},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2),
        "bytes": {name: file.size for name, file in manifest.files.items()},
        "relative_l2_to_pytorch": {graph.file: graph.parity for graph in manifest.graphs},
        "linear_gmac": {graph.file: round(graph.cost.linear_macs / 1e9, 3) for graph in manifest.graphs},
        "machine": {"processors": os.cpu_count(), "platform": platform.platform()},
        "versions": {module.__name__: module.__version__ for module in (torch, onnx, onnxruntime)},
    }


def write_checkpoint(config: DiTConfig, path: Path) -> None:
    """Write a checkpoint with random weights, all nonzero, in upstream's layout."""
    torch.manual_seed(0)
    network = DiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    torch.save({"ema_state_dict": network.state_dict(), "step": 0}, path)


if __name__ == "__main__":
    main()
