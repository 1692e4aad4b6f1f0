r"""Time complete guided runs by `sg-export bench` and compare them with PyTorch.

    python -m benchmarks.device_loop --model glyphs S/2 --batch 1 \
        --output benchmarks/results/device_loop_cpu.json
    python -m benchmarks.device_loop --model XL/2 --precision fp16 --batch 1 4 16 \
        --output …    # on a GPU

The default device is the best available one. For every model, guidance and batch size, the
benchmark builds a bundle with graphs of that fixed batch size. It times complete runs with the
bundle's default guidance. On a GPU it times them with and without CUDA graphs. The runs alternate
with a PyTorch loop, eager and under torch.compile (on a GPU: BF16, mode "max-autotune"). All models
except glyphs have random weights.

The results are percentiles, images per second, ratios, memory, and the roofline share: how much of
the machine's measured matmul and copy rate a step reaches.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.guided_step import random_checkpoint
from benchmarks.machine import machine
from sg_export import CompileOptions, Overrides, compile
from sg_export.bench.measure import BASELINES, BenchResult, bench
from sg_runtime import choose_backend
from sg_runtime.bundle import Bundle
from sg_runtime.devices.gpus import find_gpus

GUIDANCE: dict[str, dict[str, Any]] = {"sg": {"sparsity": (0.5,)}, "cfg": {"sparsity": (), "guidance": "cfg"}}
"""Compile options of each guidance. Both have a dense strong branch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["glyphs", "S/2", "B/2", "L/2", "XL/2"], nargs="+", default=["glyphs"])
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--guidance", choices=GUIDANCE, nargs="+", default=list(GUIDANCE))
    parser.add_argument("--baseline", choices=BASELINES, nargs="*", default=list(BASELINES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for model in options.model:
        for guidance in options.guidance:
            for batch in options.batch:
                for capture, result in measure(model, guidance, batch, options):
                    row = {"model": model, "guidance": guidance, "batch": batch, "cuda_graph": capture}
                    results.append(row | {**asdict(result), "bundle": ""})
                    show(row, result)
    if options.output:
        facts = machine("numpy", "torch", "onnxruntime") | {"gpus": [gpu.name for gpu in find_gpus()]}
        setup = {"precision": options.precision, "steps": options.steps, "runs": options.runs}
        content = {"machine": facts, "setup": setup, "rows": results}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(
    model: str, guidance: str, batch: int, options: argparse.Namespace
) -> list[tuple[bool | None, BenchResult]]:
    """Build and time one setting.

    The first item of each pair is whether runs were captured in a CUDA graph; None on a CPU.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint, overrides = (model, Overrides()) if model == "glyphs" else random_checkpoint(model, folder)
        built = CompileOptions(
            folder / "bundle",
            **GUIDANCE[guidance],
            steps=options.steps,
            precision=options.precision,
            batch=batch,
            overrides=overrides,
        )
        path = compile(checkpoint, built).path
        on_cpu = choose_backend(Bundle.open(path), options.device, backend=options.backend).name == "onnxruntime-cpu"
        return [
            (
                None if on_cpu else capture,
                bench(
                    path,
                    device=options.device,
                    backend=options.backend,
                    images=batch,
                    steps=options.steps,
                    runs=options.runs,
                    capture=capture,
                    # Baselines are timed only once, as they take GPU time.
                    baselines=options.baseline if capture else (),
                    checkpoint=checkpoint,
                ),
            )
            for capture in ((True,) if on_cpu else (True, False))
        ]


def show(row: dict[str, object], result: BenchResult) -> None:
    """Print the result of one setting."""
    for side in result.sides:
        share = "" if result.roofline is None or side is not result.sides[0] else f"  {result.roofline.share:.0%}"
        print(
            f"{row['model']:6} {row['guidance']:3} B={row['batch']:<2} {side.name:17} {side.precision}"
            f" {side.image.p50:9.1f} ms/image (p99 {side.image.p99:9.1f}) {side.images_per_second:8.3f} images/s"
            f"  {side.ratio:5.2f}{share}",
            flush=True,
        )


if __name__ == "__main__":
    main()
