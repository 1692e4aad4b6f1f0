"""Compare complete runs of 40 guided Euler steps of the runtime with a PyTorch loop.

    python -m benchmarks.sampling_loop --output benchmarks/results/sampling_loop.json

A run goes from classes and seeds to samples. The PyTorch loop is a direct implementation of the
paper. Each step has two passes of the model, each with its own random kept tokens, and the update.
It is eager, in FP32, with the same number of threads. Both are timed in turn; figures are medians
of the rounds with quartiles. `glyphs` is the reference model, S/2 has random weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.guided_step import PAUSE, random_checkpoint
from benchmarks.machine import machine
from sg_export import CompileOptions, LoadedModel, Overrides, compile, load_model
from sg_runtime import Pipeline

STEPS, SCALE = 40, 2.0
SETTINGS = (
    ("glyphs", 1, (0.0, 0.5)),
    ("glyphs", 16, (0.0, 0.5)),
    ("glyphs", 16, (0.5, 0.9)),
    ("S/2", 1, (0.0, 0.5)),
    ("S/2", 1, (0.5, 0.9)),
    ("S/2", 4, (0.5, 0.9)),
)
"""Settings: model, batch size, sparsities of the strong and the weak branch."""


@dataclass(frozen=True, slots=True)
class Row:
    """Speed of the runtime and of PyTorch in one setting.

    model: name of the model.
    batch: batch size.
    pair: sparsities of the strong and the weak branch.
    runtime_images_per_second: median speed of the runtime.
    pytorch_images_per_second: median speed of PyTorch.
    ratio: median speed ratio of the runtime to PyTorch.
    ratio_quartiles: lower and upper quartile of that ratio.
    """

    model: str
    batch: int
    pair: str
    runtime_images_per_second: float
    pytorch_images_per_second: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["glyphs", "S/2"], nargs="+", default=["glyphs", "S/2"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            measure(model, batch, pair, options.rounds, Path(scratch))
            for model, batch, pair in SETTINGS
            if model in options.model
        ]
    for row in rows:
        speed = f"{row.runtime_images_per_second:8.3f} images/s"
        print(f"{row.model:7} B={row.batch:<3} {row.pair:8} {speed}  {row.ratio:5.2f}")
    if options.output:
        content = {
            "machine": machine("numpy", "torch", "onnxruntime"),
            "setup": {"steps": STEPS, "threads": options.threads, "rounds": options.rounds, "precision": "fp32"},
            "rows": [asdict(row) for row in rows],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(name: str, batch: int, pair: tuple[float, float], rounds: int, folder: Path) -> Row:
    """Time complete runs of both in turn. The first round is a warm-up and is not counted."""
    checkpoint, overrides = (name, Overrides()) if name == "glyphs" else random_checkpoint(name, folder)
    strong, weak = pair
    built = CompileOptions(
        folder / "bundle", (weak,), (strong,), scale=SCALE, steps=STEPS, overrides=overrides, force=True
    )
    pipe = Pipeline.load(compile(checkpoint, built).path, batch=batch)
    loaded = load_model(checkpoint, overrides=overrides)
    classes = list(range(batch))
    sides: dict[str, Callable[[], object]] = {
        "runtime": lambda: pipe.sample(classes, seeds=range(batch)),
        "pytorch": lambda: pytorch_loop(loaded, classes, pair),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, run in sides.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - began)
    ratios = [theirs / ours for ours, theirs in zip(times["runtime"][1:], times["pytorch"][1:], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    ours, theirs = (batch / statistics.median(times[side][1:]) for side in ("runtime", "pytorch"))
    quartiles = (round(low, 3), round(high, 3))
    return Row(name, batch, f"{strong:g}/{weak:g}", round(ours, 4), round(theirs, 4), round(ratio, 3), quartiles)


def pytorch_loop(loaded: LoadedModel, classes: Sequence[int], pair: tuple[float, float]) -> Tensor:
    """Sample with 40 Euler steps of rectified flow and Sparse Guidance, in two passes per step."""
    facts, model = loaded.facts, loaded.model
    counts = [loaded.level(rate).keep for rate in pair]
    labels = torch.tensor(classes)
    x = torch.randn(len(classes), *facts.latent)

    def subset(count: int) -> Tensor | None:
        if count == facts.tokens:
            return None
        return torch.rand(len(classes), facts.tokens).argsort(dim=1)[:, :count].sort(dim=1).values

    with torch.no_grad():
        for step in range(STEPS):
            t = torch.full((len(classes),), 1 - step / STEPS)
            strong, weak = (model(x, t, labels, subset(count)) for count in counts)
            x = x - (weak + SCALE * (strong - weak)) / STEPS
    return x


if __name__ == "__main__":
    main()
