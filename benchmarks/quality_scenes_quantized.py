"""Measure how INT8 and FP8 change the pictures of `scenes`: accuracy and Fréchet distance.

    python -m benchmarks.quality_scenes_quantized

INT8 and FP8 are compared with FP32 at equal captions and seeds. The settings are unguided, CFG and
SG, those with the best accuracy in `quality_scenes.json`. Reader, captions and seeds are the same
as there. Bundles are built as by `sg-export build --precision`. The reader and all samples are kept
in the work folder, so an interrupted run can be resumed.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sg_export
from benchmarks.glyph_report import mean_and_deviation
from benchmarks.guidance_grid import Setting
from benchmarks.machine import machine
from benchmarks.quality_scenes import BATCH, CAPTION_SEEDS, FULL, QUICK, Sampler
from benchmarks.scene_judge import Judge, cached_reader, draw_captions
from benchmarks.scene_report import SUMMARY
from sg_export.options.quantize import QuantizeOptions
from sg_runtime import Pipeline
from sg_runtime.files import replacing
from sg_runtime.manifest import GuidanceMode, QuantizedType

MODES: tuple[GuidanceMode, ...] = ("none", "cfg", "sg")


def settings_of(results: Mapping[str, Any]) -> tuple[Setting, ...]:
    """Return the setting of each of `MODES` with the best accuracy.

    results: those of `quality_scenes`.
    """
    rows = [row for row in results["measured"] if row["parameters"] is not None]
    best = []
    for mode in MODES:
        own = [row for row in rows if row["parameters"]["guidance"] == mode]
        best.append(Setting(**max(own, key=lambda row: row["mean"]["all"])["parameters"]))
    return tuple(best)


def build(setting: Setting, kind: QuantizedType | None, checkpoint: str, folder: Path) -> Pipeline:
    """Build a bundle for one setting. kind: quantized type; None for FP32."""
    options = sg_export.CompileOptions(
        folder,
        guidance=setting.guidance,
        strong_sparsity=(setting.strong_sparsity,),  # type: ignore[arg-type]  # no schedule
        sparsity=() if setting.sparsity is None else (setting.sparsity,),  # type: ignore[arg-type]
        quantize=None if kind is None else QuantizeOptions(kind),
        batch=BATCH,
        force=True,
    )
    return Pipeline.load(sg_export.compile(checkpoint, options).path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=["int8", "fp8"], nargs="+", default=["int8", "fp8"])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quality_scenes.json"))
    parser.add_argument("--checkpoint", default="scenes", help="folder of the model (default: the reference model)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quality_scenes"), help="folder of reader, bundles and samples"
    )
    parser.add_argument("--quick", action="store_true", help="use a tiny budget, only to check that all parts work")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality_scenes_quantized.json"))
    options = parser.parse_args()
    budget = QUICK if options.quick else FULL
    (options.work / "samples").mkdir(parents=True, exist_ok=True)
    reader = cached_reader(options.work, budget.reader_steps)
    judge = Judge.of(reader, draw_captions(budget.captions, CAPTION_SEEDS["measurement"]), budget.drawings)
    rows = []
    for setting in settings_of(json.loads(options.results.read_bytes())):
        for kind in (None, *options.type):
            name = kind or "fp32"
            pipe = build(setting, kind, options.checkpoint, options.work / "bundles" / f"{setting.guidance}-{name}")
            sampler = Sampler({setting.guidance: pipe}, options.work / "samples", budget.steps)
            row = sampler.row(setting, judge, budget.each, budget.blocks)
            values = {
                column: mean_and_deviation([get(one) for one in row.figures]) for column, (get, _) in SUMMARY.items()
            }
            print(f"{row.name:32} {name:5}", {column: f"{m:.3f} ± {d:.3f}" for column, (m, d) in values.items()})
            rows.append({"precision": name, **asdict(row), "summary": values})
    content = {"machine": machine("numpy", "onnxruntime"), "protocol": asdict(budget), "rows": rows}
    with replacing(options.output) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
