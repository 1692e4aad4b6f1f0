r"""Measure build time, peak memory and size of TensorRT-RTX engines of the guided step.

    python -m benchmarks.engine_builds --model glyphs S/2 XL/2 \
        --output benchmarks/results/engine_builds.json

Needs no GPU. The guided graph has symbolic token counts and γ_strong = 0. It is built with one
profile (γ_weak = 0.5) and with three (γ_weak = 0.5, 0.75 and 0.9), each for one image. All models
except glyphs have random weights. Each build runs in a separate process; its time and peak memory
are the figures that a bundle's manifest records.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from benchmarks.guided_step import random_checkpoint
from benchmarks.machine import machine
from sg_engines.child import build_in_child
from sg_engines.trt import EngineRecipe
from sg_export import LoadedModel, load_model
from sg_export.graph.half import fp32_layers, half_attentions, to_half
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.packing.engines import count_fused_attention, profile_shapes
from sg_runtime.manifest import Precision, Profile

WEAK = (0.5, 0.75, 0.9)


@dataclass(frozen=True, slots=True)
class Row:
    """One build.

    model: name of the model.
    precision: precision of the engine.
    profiles: number of profiles in the engine.
    seconds: build time.
    memory_gb: peak memory of the build.
    engine_mb: size of the engine.
    weights_mb: size of the graph's weights.
    growth: engine size / engine size with one profile.
    fused_attentions: number of fused attention kernels in the engine.
    half_attentions: number of attentions with half-precision matmuls in the graph.
    """

    model: str
    precision: Precision
    profiles: int
    seconds: float
    memory_gb: float
    engine_mb: float
    weights_mb: float
    growth: float
    fused_attentions: int
    half_attentions: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=["glyphs", "S/2", "B/2", "L/2", "XL/2"], nargs="+", default=["glyphs", "S/2"]
    )
    parser.add_argument("--precision", choices=get_args(Precision), nargs="+", default=list(get_args(Precision)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.model:
        with tempfile.TemporaryDirectory() as scratch:
            loaded = load(name, Path(scratch))
            for precision in options.precision:
                rows += measure(name, loaded, precision, Path(scratch))
    if options.output:
        facts = machine("torch", "onnx", "tensorrt-rtx")
        options.output.write_text(
            json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


def load(name: str, folder: Path) -> LoadedModel:
    """Load the reference model, or a model of the named size with random weights."""
    if name == "glyphs":
        return load_model(name)
    checkpoint, overrides = random_checkpoint(name, folder)
    return load_model(checkpoint, overrides=overrides)


def measure(name: str, loaded: LoadedModel, precision: Precision, folder: Path) -> list[Row]:
    """Build and measure the engine with one profile and with three."""
    specs = [GraphSpec("guided", (loaded.level(0.0), loaded.level(rate))) for rate in WEAK]
    (model,) = trace(loaded.model, specs[:1], loaded.facts, None, DEFAULT_OPSET, symbolic_keep=True)
    if precision != "fp32":
        to_half(model.graph, precision, fp32_layers(loaded.model, precision))
    attentions = half_attentions(model.graph)
    (path,) = write_graphs([model], folder, "weights.bin")
    rows: list[Row] = []
    for count in (1, len(specs)):
        profiles = [Profile(1, tuple(level.keep for level in spec.levels)) for spec in specs[:count]]
        plan = EngineRecipe(tuple(profile_shapes(profile, specs[0], loaded.facts) for profile in profiles))
        engine = folder / "guided.engine"
        figures = build_in_child("tensorrt_rtx", path, plan, engine, lambda phase, done, steps: None)
        size = engine.stat().st_size / 1e6
        row = Row(
            model=name,
            precision=precision,
            profiles=count,
            seconds=round(figures.seconds, 1),
            memory_gb=round(figures.memory_bytes / 1e9, 2),
            engine_mb=round(size, 1),
            weights_mb=round((folder / "weights.bin").stat().st_size / 1e6, 1),
            growth=round(size / rows[0].engine_mb, 3) if rows else 1.0,
            fused_attentions=count_fused_attention(engine),
            half_attentions=attentions,
        )
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
