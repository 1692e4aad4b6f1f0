"""Measure how INT8 and FP8 change the samples of `glyphs`: accuracy and Fréchet distances.

    python -m benchmarks.quality_quantized --output benchmarks/results/quality_quantized.json

INT8 and FP8 are compared with FP32 at equal seeds. The settings are unguided, CFG and SG, at the
best scales and sparsities of `benchmarks/quality_glyphs.py`. Classifier, reference images and the
three seeds are the same as there, with 2,108 samples per seed. Bundles are built as by
`sg-export build --precision`. The classifier and all samples are kept in the work folder, so an
interrupted run can be resumed.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.glyph_judge import MEASURE_SEED, Judge, cached_classifier
from benchmarks.guidance_grid import Setting
from benchmarks.machine import machine
from benchmarks.quality_glyphs import BATCH, FULL, QUICK, Budget, Sampler
from sg_export import CompileOptions, compile
from sg_export.options.quantize import QuantizeOptions
from sg_runtime import Pipeline
from sg_runtime.manifest import GuidanceMode, QuantizedType

SETTINGS = (Setting("none"), Setting("cfg", 1.5), Setting("sg", 3.0, 0.25, 0.9))
BUILDS: dict[GuidanceMode, dict[str, Any]] = {
    "cfg": {"guidance": "cfg"},
    "sg": {"sparsity": (0.9,), "strong_sparsity": (0.25,)},
}
FIGURES = ("accuracy", "frechet_training", "frechet_held_out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=["int8", "fp8"], nargs="+", default=["int8"])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quality_quantized"), help="folder of classifier, bundles and samples"
    )
    parser.add_argument("--quick", action="store_true", help="use a tiny budget, only to check that all parts work")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    budget = QUICK if options.quick else FULL
    samples = options.work / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    classifier = cached_classifier(options.work, budget.classifier_variants, budget.classifier_epochs)
    judge = Judge.of(classifier, budget.reference_variants, MEASURE_SEED)
    rows = []
    for kind in (None, *options.type):
        rows += measure(kind, budget, judge, options.work, samples)
    show(rows)
    if options.output:
        protocol = {"steps": budget.steps, "seeds": len(budget.blocks), "samples": 62 * budget.measured}
        content = {"machine": machine("numpy", "onnxruntime"), "protocol": protocol, "rows": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(
    kind: QuantizedType | None, budget: Budget, judge: Judge, work: Path, samples: Path
) -> list[dict[str, Any]]:
    """Measure all settings in one precision.

    kind: quantized type; None for FP32.
    """
    name = kind or "fp32"
    pipes: dict[GuidanceMode, Pipeline] = {}
    for mode, build in BUILDS.items():
        folder = work / f"{mode}-{name}"
        quantize = None if kind is None else QuantizeOptions(kind)
        path = compile("glyphs", CompileOptions(folder, **build, quantize=quantize, force=True)).path
        pipes[mode] = Pipeline.load(path, batch=BATCH)
    pipes["none"] = pipes["cfg"]
    sampler = Sampler(pipes, samples, budget.steps)
    rows = []
    for setting in SETTINGS:
        row = sampler.row(setting, budget.measured, budget.blocks, judge)
        rows.append({"precision": name, "name": row.name, "figures": [asdict(figures) for figures in row.figures]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print means and standard deviations over the seeds."""
    for row in rows:
        values = {figure: [seed[figure] for seed in row["figures"]] for figure in FIGURES}
        text = "  ".join(f"{name} {statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for name, v in values.items())
        print(f"{row['name']:24} {row['precision']:5} {text}")


if __name__ == "__main__":
    main()
