"""Time the guided step of two bundles of one model in turn, for example before and after a change.

    python -m benchmarks.step_of_bundles BEFORE AFTER --output RESULTS

Bundles of earlier versions can be given, if the runtime still runs them. Both bundles compute the
same step through `Pipeline.guided` on the CPU, and their results are compared. The ratio is the
median of the rounds' ratios of the second time to the first, with quartiles. Rows of other models
and batch sizes in the output file are kept.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from sg_runtime.pipeline import Pipeline

ROUNDS = 41


@dataclass(frozen=True, slots=True)
class Row:
    """Times of a guided step in milliseconds, and the relative L2 distance of the results."""

    model: str
    images: int
    before_ms: float
    after_ms: float
    ratio: float
    quartiles: tuple[float, float]
    distance: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--model", default="glyphs", help="name of the model in the results")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    pipes = [Pipeline.load(bundle, "cpu", threads=options.threads) for bundle in options.bundles]
    rows = [measure(options.model, pipes, images) for images in options.batch]
    for row in rows:
        print(row)
    if options.output:
        earlier = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
        new = {(row.model, row.images) for row in rows}
        kept = [row for row in earlier if (row["model"], row["images"]) not in new]
        facts = machine("numpy", "onnxruntime") | {"threads": options.threads}
        content = {"machine": facts, "rows": [*kept, *map(asdict, rows)]}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(model: str, pipes: list[Pipeline], images: int) -> Row:
    """Time a step of both pipelines after one that is not counted."""
    classes, seeds = [*range(images)], [*range(images)]
    x = pipes[0].initial_noise(seeds)
    plans = [pipe.prepare([0.7], classes, seeds) for pipe in pipes]
    times = np.empty((ROUNDS + 1, 2))
    for round_times in times:
        results = []
        for number, (pipe, plan) in enumerate(zip(pipes, plans, strict=True)):
            began = time.perf_counter()
            results.append(np.asarray(pipe.guided(x, plan, 0)))
            round_times[number] = (time.perf_counter() - began) * 1e3
    before, after = (round(float(value), 3) for value in np.median(times[1:], axis=0))
    ratios = np.percentile(times[1:, 1] / times[1:, 0], [25, 50, 75])
    low, ratio, high = (round(float(value), 3) for value in ratios)
    distance = np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0])
    return Row(model, images, before, after, ratio, (low, high), float(distance))


if __name__ == "__main__":
    main()
