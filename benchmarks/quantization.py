"""Measure range methods, default builds and speed of INT8 and FP8.

    python -m benchmarks.quantization --modelopt --output benchmarks/results/quantization.json
    python -m benchmarks.quantization --model S/2 --output benchmarks/results/quantization.json

If the output file exists and is from the same machine and libraries, its other models are kept.

Everything runs on ONNX Runtime's CPU provider and is compared with FP32, for SG at sparsities 0 and
0.5. There are three parts:

Methods  All layers are quantized, with the same calibration for each method. Methods are judged on
         images, classes and kept tokens that the calibration did not use; the figure is the worst
         of 25 times. With `--modelopt`, NVIDIA's ModelOpt (nvidia-modelopt[onnx]) is also judged,
         with the same feeds and its own choice of operators.
Default  The result of `sg-export build --precision` with this calibration, including its search,
         and the build time.
Speed    One guided step of each bundle, timed in turn in every round. A ratio is the median of the
         rounds' ratios to FP32.

S/2 has random weights. It shows cost and speed, but not the quality of a trained S/2 in eight bits.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from benchmarks.guided_step import PAUSE, random_checkpoint
from benchmarks.machine import machine
from sg_calibration.feeds import collect, identity_of, read_shard
from sg_calibration.layers import layers_of
from sg_calibration.ranges import RangeTable, write_table
from sg_calibration.settings import METHODS, FeedSettings
from sg_export import CompileOptions, Overrides, compile
from sg_export.options.quantize import QuantizeOptions
from sg_export.parity.walk import Walk, judge
from sg_export.quantize.rewrite import BATCH, quantized_pipeline, reference_pipeline
from sg_export.quantize.search import measure_ranges, walks_of
from sg_runtime.backends.ort import OrtBackend, open_session
from sg_runtime.bundle import Bundle
from sg_runtime.guidance import built_guidances
from sg_runtime.manifest import QuantizedType
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.launches import launches

Feeds = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["glyphs", "S/2", "B/2"], nargs="+", default=["glyphs"])
    parser.add_argument("--type", choices=["int8", "fp8"], nargs="+", default=["int8", "fp8"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument(
        "--images", type=int, default=8, help="number of images to judge the methods on (default %(default)s)"
    )
    parser.add_argument("--modelopt", action="store_true")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 4], help="numbers of images in the timed step (default 1 and 4)"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in options.model:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            checkpoint, overrides = (name, Overrides()) if name == "glyphs" else random_checkpoint(name, folder)
            reference = compile(checkpoint, CompileOptions(folder / "fp32", (0.5,), overrides=overrides))
            began = time.perf_counter()
            ranges = measure_ranges(reference, FeedSettings(options.samples), None, None, lambda stage, share: None)
            write_table(ranges, folder / "ranges.json")
            calibration_seconds = time.perf_counter() - began
            rows = methods(reference, options.type, ranges, options.images)
            if options.modelopt:
                rows += modelopt(reference, options.type, FeedSettings(options.samples), options.images, folder)
            bundles, built = {"fp32": reference}, []
            for kind in options.type:
                quantize = QuantizeOptions(kind, table=folder / "ranges.json")
                began = time.perf_counter()
                bundles[kind] = compile(
                    checkpoint, CompileOptions(folder / kind, (0.5,), overrides=overrides, quantize=quantize)
                )
                built.append({"seconds": time.perf_counter() - began, **described(bundles[kind], reference)})
            results.append(
                {
                    "model": name,
                    "calibration_seconds": calibration_seconds,
                    "methods": rows,
                    "default": built,
                    "speed": [row for batch in options.batch for row in speed(bundles, batch, options.rounds)],
                }
            )
        if options.output:
            write(options.output, results, {"samples": options.samples, "images": options.images})


def write(path: Path, models: list[dict[str, Any]], setup: dict[str, int]) -> None:
    """Write the results to `path`.

    If the file is from the same machine and setup, its results of other models are kept.
    """
    content: dict[str, Any] = {"machine": machine("numpy", "onnxruntime"), "setup": setup}
    kept: list[dict[str, Any]] = []
    if path.exists():
        before = json.loads(path.read_text())
        kept = before.pop("models")
        kept = kept if before == content else []
    names = {own["model"] for own in models}
    content["models"] = [own for own in kept if own["model"] not in names] + models
    path.write_text(json.dumps(content, indent=1) + "\n")


def methods(reference: Bundle, kinds: list[QuantizedType], table: RangeTable, images: int) -> list[dict[str, Any]]:
    """Judge each type and method with all layers quantized, at the worst of all times."""
    walks = walks_of(reference_pipeline(reference), "gate", images)
    graphs = [onnx.load(reference.onnx(graph), load_external_data=False) for graph in reference.manifest.graphs]
    layers = sorted({name for graph in graphs for name in layers_of(graph, reference.manifest.model.ends)})
    rows = []
    for kind in kinds:
        for method in METHODS:
            pipe = quantized_pipeline(reference, kind, table.ranges(method), layers)
            rows.append(judged(kind, method, pipe, walks))
    return rows


def judged(kind: QuantizedType, method: str, pipe: Pipeline, walks: list[Walk]) -> dict[str, Any]:
    """Judge a pipeline and return its row in the table of methods."""
    quality = judge(pipe, walks)
    guided, cosine = max(q.guided for q in quality), min(min(q.strong, q.weak) for q in quality)
    row = {"type": kind, "method": method, "guided": guided, "cosine": cosine}
    print(row, flush=True)
    return row


def modelopt(
    reference: Bundle, kinds: list[QuantizedType], settings: FeedSettings, images: int, folder: Path
) -> list[dict[str, Any]]:
    """Judge ModelOpt's quantization of the guided graph, with its defaults, against FP32."""
    from modelopt.onnx.quantization import quantize
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    feeds = guided_feeds(reference, settings, folder / "feeds")

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime is untyped
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.left = iter(feeds)

        def get_first(self) -> Feeds:
            return feeds[0]

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    guided = reference.onnx(next(graph for graph in reference.manifest.graphs if graph.kind == "guided"))
    source, made = folder / "plain.onnx", folder / "modelopt.onnx"
    onnx.save(onnx.load(guided), source)  # one file, because ModelOpt moves it
    walks = walks_of(reference_pipeline(reference), "gate", images)

    def opened(path: Path) -> InferenceSession:
        return open_session(path, made.read_bytes() if path == guided else None)

    rows = []
    for kind in kinds:
        for method in ("max", "entropy"):
            quantize(
                str(source),
                quantize_mode=kind,
                calibration_method=method,
                calibration_data_reader=Reader(),
                calibration_eps=["cpu"],
                high_precision_dtype="fp32",
                output_path=str(made),
                log_level="ERROR",
            )
            pipe = Pipeline(reference, OrtBackend(reference, open_graph=opened), BATCH)
            rows.append(judged(kind, f"ModelOpt, {method}", pipe, walks))
    return rows


def guided_feeds(reference: Bundle, settings: FeedSettings, folder: Path) -> list[Feeds]:
    """Return the inputs of the guided graph in the runs that ranges are measured on."""
    pipe, manifest = reference_pipeline(reference), reference.manifest
    (guidance,) = built_guidances(manifest)
    runner = GraphRunner(manifest, pipe.backend.lane(), pipe.batch, pipe.backend.batches)
    feeds = []
    for path in collect(pipe, [guidance], settings, folder, identity_of(manifest), lambda *_: None):
        shard = read_shard(path, manifest.model)
        images = (shard.conditions, shard.seed.tolist())
        plan = pipe.prepare(shard.time, *images, counters=shard.counters, guidance=guidance)
        for index, x in enumerate(shard.x):
            (launch,) = launches(manifest, plan, index, 0.0, 1.0, 0.0)
            for group in runner.groups(len(x)):
                own = runner.feeds(plan, launch, x, x, group)
                feeds.append({name: np.asarray(value) for name, value in own.items()})
    return feeds


def described(bundle: Bundle, reference: Bundle) -> dict[str, Any]:
    """Return the facts of a default build."""
    plan = bundle.manifest.quantization
    assert plan is not None
    sizes = [b.manifest.files["graphs/weights.bin"].size for b in (bundle, reference)]
    facts = {
        "type": plan.type,
        "layers": len(plan.layers),
        "high_precision": [layer.name for layer in plan.layers if not layer.quantized],
        "quality": [asdict(quality) for quality in plan.quality],
        "runs": plan.runs,
        "mask_noise": plan.mask_noise,
        "remarks": plan.remarks,
        "weights_bytes": sizes[0],
        "weights_of_fp32": sizes[0] / sizes[1],
        "sensitivity": {layer.name: layer.sensitivity for layer in plan.layers},
    }
    print({name: value for name, value in facts.items() if name not in ("quality", "sensitivity")}, flush=True)
    return facts


def speed(bundles: Mapping[str, Bundle], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time a guided step of every bundle.

    Returns milliseconds and the ratio to FP32, as medians and quartiles of the rounds.
    """
    pipes = {name: Pipeline.load(bundle.path, device="cpu", batch=batch) for name, bundle in bundles.items()}
    classes, seeds = [image % 4 for image in range(batch)], list(range(batch))
    plans = {name: pipe.prepare([0.6], classes, seeds) for name, pipe in pipes.items()}
    x = pipes["fp32"].initial_noise(seeds)
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(rounds + 1):  # the first round is a warm-up
        for name, pipe in pipes.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            pipe.guided(x, plans[name])
            if number:
                times[name].append(1e3 * (time.perf_counter() - began))
    rows = []
    for name, own in times.items():
        ratios = [mine / base for mine, base in zip(own, times["fp32"], strict=True)]
        (low, median, high), (low_ratio, ratio, high_ratio) = (statistics.quantiles(v) for v in (own, ratios))
        row = {
            "precision": name,
            "batch": batch,
            "rounds": rounds,
            "median_ms": median,
            "quartiles_ms": [low, high],
            "ratio": ratio,
            "ratio_quartiles": [low_ratio, high_ratio],
        }
        print(row, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
