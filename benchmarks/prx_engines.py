r"""Measure export and TensorRT-RTX engines of a PRX of 1.2 billion parameters.

    python -m benchmarks.prx_engines --output benchmarks/results/prx_engines.json
    python -m benchmarks.prx_engines --depth 4 --output …

Needs no GPU. The shapes are those of the published model for 512² with the flux VAE; weights are
random, and engines are for one image and SM 8.9. `sg-export build` runs in a separate process, with
one profile (γ 0/0.5) and with three (0/0.5, 0/0.75, 0/0.9). Each engine is built in a process of
its own, which is measured too. Needs three times the FP32 weights' size on disk and in memory.

With --fp8, the guided graph alone is also built in FP8, with three profiles: all layers that can be
quantized have the fixed range 8, and the rest is in FP16. `sg-export` would measure ranges, search
for layers and judge them on complete runs, which says nothing about random weights.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from benchmarks.machine import machine
from benchmarks.prx_models import Shape, published, write_folder
from sg_calibration.layers import layers_of
from sg_engines.child import build_in_child
from sg_engines.trt import EngineRecipe
from sg_export import load_model
from sg_export.graph.half import fp32_layers, to_half
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.packing.engines import count_fused_attention, profile_shapes
from sg_export.quantize.rewrite import quantized_model
from sg_runtime.bundle import Bundle
from sg_runtime.files import CACHE
from sg_runtime.manifest import Profile

RANGE = 8.0
"""Largest magnitude of every quantized activation in FP8."""

WEAK = (("0.5",), ("0.5", "0.75", "0.9"))


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    graph: name of its graph.
    profiles: number of its profiles.
    seconds: time of its build.
    memory_gb: peak memory of the process that builds it.
    engine_mb: its size.
    fused_attentions: number of fused attention kernels in it.
    """

    graph: str
    profiles: int
    seconds: float
    memory_gb: float
    engine_mb: float
    fused_attentions: int


@dataclass(frozen=True, slots=True)
class Row:
    """One bundle.

    depth: number of blocks.
    parameters: number of weights.
    precision: precision of its engines.
    sparsities: sparsities of the weak branch.
    seconds: time of the command.
    memory_gb: peak memory of the compiler's process, or of an engine's build if that is higher.
    bundle_mb: size of the bundle.
    growth: size of the guided engine / its size with one profile.
    engines: its engines.
    """

    depth: int
    parameters: int
    precision: str
    sparsities: tuple[str, ...]
    seconds: float
    memory_gb: float
    bundle_mb: float
    growth: float
    engines: list[Engine]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--precision", choices=["fp16", "bf16"], nargs="*", default=["fp16"])
    parser.add_argument("--fp8", action="store_true", help="also build the guided graph in FP8")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    fp8: Engine | None = None

    def save() -> None:
        """Write what is measured so far."""
        if options.output:
            content: dict[str, object] = {"machine": machine("torch", "onnx", "tensorrt-rtx")}
            content |= {"rows": [asdict(row) for row in rows], "fp8": fp8 and asdict(fp8)}
            options.output.write_text(json.dumps(content, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        shape = published(512, depth=options.depth)
        folder = write_folder(shape, Path(scratch) / "prx")
        for precision in options.precision:
            first = None
            for sparsities in WEAK:
                row = measure(folder, str(shape.route), precision, sparsities, first, Path(scratch))
                first = first or guided(row).engine_mb
                rows.append(row)
                print(row, flush=True)
                save()
        if options.fp8:
            fp8 = measure_fp8(folder, shape, Path(scratch))
            print(fp8, flush=True)
            save()


def guided(row: Row) -> Engine:
    """Return the engine of the guided graph."""
    return next(engine for engine in row.engines if engine.graph == "guided")


def measure(
    folder: Path, route: str, precision: str, sparsities: tuple[str, ...], first: float | None, scratch: Path
) -> Row:
    """Build a bundle and measure it. first: size in MB of the guided engine with one profile."""
    output, cache = scratch / "bundle", scratch / "cache"
    command = [sys.executable, "-m", "sg_export", "build", str(folder), "--route", route, "--size", "512x512"]
    command += ["--target", "tensorrt-rtx", "--sm", "89", "--precision", precision]
    command += [part for sparsity in sparsities for part in ("--sparsity", sparsity)]
    command += ["--output", str(output), "--force", "--quiet"]
    began = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {CACHE: str(cache)})
    _, status, usage = os.wait4(process.pid, 0)  # the higher of its own memory and its children's
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"expected a build, found exit code {process.returncode}")
    manifest = Bundle.open(output, verify_hashes=False).manifest
    engines = [
        Engine(
            engine.kind,
            len(engine.profiles),
            engine.build_seconds,
            round(engine.build_memory_bytes / 1e9, 2),
            round(manifest.files[engine.file].size / 1e6, 1),
            engine.fused_attention or 0,
        )
        for engine in manifest.engines
    ]
    size = next(engine.engine_mb for engine in engines if engine.graph == "guided")
    row = Row(
        depth=manifest.model.depth,
        parameters=manifest.model.parameters,
        precision=precision,
        sparsities=sparsities,
        seconds=round(seconds, 1),
        memory_gb=round(usage.ru_maxrss * 1024 / 1e9, 2),
        bundle_mb=round(sum(file.size for file in manifest.files.values()) / 1e6, 1),
        growth=round(size / (first or size), 3),
        engines=engines,
    )
    shutil.rmtree(output)
    shutil.rmtree(cache, ignore_errors=True)
    return row


def measure_fp8(folder: Path, shape: Shape, scratch: Path) -> Engine:
    """Build the engine of the guided graph in FP8 with three profiles, and measure it."""
    loaded = load_model(folder, overrides=shape.overrides)
    specs = [GraphSpec("guided", (loaded.level(0.0), loaded.level(float(rate)))) for rate in WEAK[-1]]
    (model,) = trace(loaded.model, specs[:1], loaded.facts, None, DEFAULT_OPSET, symbolic_keep=True)
    for name in ("fp32", "fp8"):
        (scratch / name).mkdir()
    (path,) = write_graphs([model], scratch / "fp32", "weights.bin")
    layers = list(layers_of(onnx.load(path, load_external_data=False), loaded.facts.ends))
    model = quantized_model(path, "fp8", dict.fromkeys(layers, RANGE), layers)
    to_half(model.graph, "fp16", fp32_layers(loaded.model, "fp16"))
    (path,) = write_graphs([model], scratch / "fp8", "weights.bin")
    profiles = [Profile(1, tuple(level.keep for level in spec.levels)) for spec in specs]
    recipe = EngineRecipe(tuple(profile_shapes(profile, specs[0], loaded.facts) for profile in profiles), (89,))
    plan = scratch / "fp8.engine"
    figures = build_in_child("tensorrt_rtx", path, recipe, plan, lambda phase, done, steps: None)
    return Engine(
        "guided",
        len(profiles),
        round(figures.seconds, 1),
        round(figures.memory_bytes / 1e9, 2),
        round(plan.stat().st_size / 1e6, 1),
        count_fused_attention(plan),
    )


if __name__ == "__main__":
    main()
