"""INT8 and FP8: which way to find ranges is best, what the default build reaches at every time, its size and its speed.

    python -m benchmarks.quantization --model glyphs S/2 --output benchmarks/results/quantization.json

Everything on ONNX Runtime's CPU provider, over FP32, for SG at sparsities 0 and 0.5. Methods: all layers quantized, the
same calibration, judged on images, classes and token subsets of their own: the worst of 25 times. Default: what
`sg-export build --precision` makes, its search included; sizes of the weights, and the time of a guided step over that
of FP32, in turn. S/2 has random weights, which are harder to quantize than trained ones in no known way.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.guided_step import random_checkpoint
from benchmarks.machine import machine
from sg_calibration.feeds import images_of
from sg_calibration.settings import METHODS, FeedSettings
from sg_export import CompileOptions, Overrides, compile
from sg_export.quality import by_pipeline, judge, walk
from sg_export.quantization import STRATA, measure_ranges, quantized_pipeline, reference_pipeline
from sg_export.quantize_options import QuantizeOptions
from sg_runtime.bundle import Bundle
from sg_runtime.guidance import built_guidances
from sg_runtime.manifest import QuantizedType


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["glyphs", "S/2", "B/2"], nargs="+", default=["glyphs"])
    parser.add_argument("--type", choices=["int8", "fp8"], nargs="+", default=["int8", "fp8"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--images", type=int, default=8, help="Images that methods are judged on.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in options.model:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            checkpoint, overrides = (name, Overrides()) if name == "glyphs" else random_checkpoint(name, folder)
            reference = compile(checkpoint, CompileOptions(folder / "fp32", (0.5,), overrides=overrides))
            feeds = FeedSettings(options.samples)
            rows = methods(reference, options.type, feeds, options.images)
            built = [
                default(checkpoint, overrides, kind, feeds, reference, folder / f"bundle-{kind}")
                for kind in options.type
            ]
            results.append({"model": name, "methods": rows, "default": built})
    if options.output:
        content = {
            "machine": machine("numpy", "onnxruntime"),
            "setup": {"samples": options.samples, "images": options.images},
            "models": results,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def methods(reference: Bundle, kinds: list[QuantizedType], feeds: FeedSettings, images: int) -> list[dict[str, Any]]:
    """The worst of all times, with all layers quantized, by type and method."""
    pipe = reference_pipeline(reference)
    table = measure_ranges(reference, feeds, None, None, lambda stage, share: None)
    walks = [
        walk(pipe, by_pipeline(pipe), guidance, *images_of("gate", reference.manifest.model, images), STRATA)
        for guidance in built_guidances(reference.manifest)
    ]
    rows = []
    for kind in kinds:
        for method in METHODS:
            ranges = table.ranges(method)
            quality = judge(quantized_pipeline(reference, kind, ranges, list(ranges)), walks)
            row = {
                "type": kind,
                "method": method,
                "guided": max(q.guided for q in quality),
                "cosine": min(min(q.strong, q.weak) for q in quality),
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def default(
    checkpoint: str | Path,
    overrides: Overrides,
    kind: QuantizedType,
    feeds: FeedSettings,
    reference: Bundle,
    path: Path,
) -> dict[str, Any]:
    """What a default build makes."""
    options = CompileOptions(path, (0.5,), overrides=overrides, quantize=QuantizeOptions(kind, feeds=feeds))
    bundle = compile(checkpoint, options)
    plan = bundle.manifest.quantization
    assert plan is not None
    sizes = [b.manifest.files["graphs/weights.bin"].size for b in (bundle, reference)]
    facts = {
        "type": kind,
        "layers": len(plan.layers),
        "high_precision": [layer.name for layer in plan.layers if not layer.quantized],
        "quality": [asdict(quality) for quality in plan.quality],
        "runs": plan.runs,
        "mask_noise": plan.mask_noise,
        "weights_bytes": sizes[0],
        "weights_of_fp32": sizes[0] / sizes[1],
        "time_of_fp32": plan.time_ratio,
        "sensitivity": {layer.name: layer.sensitivity for layer in plan.layers},
    }
    print({name: value for name, value in facts.items() if name not in ("quality", "sensitivity")}, flush=True)
    return facts


if __name__ == "__main__":
    main()
