"""Load test of `sg-export triton`: a real tritonserver next to the bare pipeline.

    sg-export build --sparsity 0.5 -o glyphs-bundle
    pip install --no-deps --target .triton -r tests/triton.txt
    python -m benchmarks.triton_load glyphs-bundle --output benchmarks/results/triton_load.json

First it measures images per second of the bare pipeline. Then requests arrive at random times
(Poisson) by gRPC, at 0.7 and 1.3 of that rate, whether or not the server keeps up. Every image is
compared with one that the pipeline made alone. A request is lost if it has neither an answer nor an
error. Everything runs on this machine and on its loopback address. `perf_analyzer` is not used: its
package on PyPI has no program.
"""

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine
from benchmarks.serve_load import DISTINCT, Tally, arrivals
from benchmarks.tritonserver import missing, running
from sg_export.triton import Settings, write_repository
from sg_runtime.pipeline import Pipeline

SHARES = (0.7, 1.3)
"""Rates of arrival, as shares of the bare pipeline's throughput."""

TIMEOUT = 30.0
"""Seconds within which the run of a request must begin."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if (lacks := missing()) is not None:
        parser.error(lacks)
    result: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime", "nvidia-pytriton", "tritonclient"),
        "load": {"batch": options.batch, "steps": options.steps, "queue": options.queue, "threads": 1},
    }

    def report(name: str, found: Any) -> None:
        result[name] = found
        print(json.dumps({name: found}, indent=1), flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    pipe = Pipeline.load(options.bundle, "cpu", batch=options.batch, threads=1)
    count = pipe.bundle.manifest.model.labels.count
    expected = images_of(pipe, options.steps)
    rate = bare_rate(pipe, options.steps, options.seconds)
    report("bare", {"images_per_second": round(rate, 3)})
    pipe.release()
    settings = Settings(batch=options.batch, queue=options.queue, timeout=TIMEOUT, device="cpu", threads=1)
    with tempfile.TemporaryDirectory() as scratch:
        write_repository(options.bundle, Path(scratch, "models"), settings, name="loaded", link=True)
        with running(Path(scratch, "models"), Path(scratch)) as server:
            for share in SHARES:
                found = open_loop(server.grpc, share * rate, options.seconds, options.steps, count, expected)
                report(f"triton at {share:g}", {"arrivals_per_second": round(share * rate, 2)} | found)


def images_of(pipe: Pipeline, steps: int) -> list[NDArray[Any]]:
    """Return the image of each distinct request."""
    found: list[NDArray[Any]] = []
    count = pipe.bundle.manifest.model.labels.count
    for first in range(0, DISTINCT, pipe.batch):
        numbers = range(first, first + pipe.batch)
        found += list(pipe([number % count for number in numbers], [1000 + number for number in numbers], steps=steps))
    return found[:DISTINCT]


def bare_rate(pipe: Pipeline, steps: int, seconds: float) -> float:
    """Return the images per second of the pipeline, a full batch at a time."""
    images, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        pipe([0] * pipe.batch, range(images, images + pipe.batch), steps=steps)
        images += pipe.batch
    return images / (time.monotonic() - began)


def open_loop(
    address: str, rate: float, seconds: float, steps: int, count: int, expected: Sequence[NDArray[Any]]
) -> dict[str, Any]:
    """Send requests at random times by gRPC, whether or not the server keeps up."""
    from tritonclient import grpc

    tally, lock, draw = Tally(), threading.Lock(), random.Random(0)
    waiting = threading.Semaphore(0)

    def ended(index: int, arrived: float) -> Callable[[Any, Any], None]:
        def record(result: Any, error: Any) -> None:
            taken = time.monotonic() - arrived
            with lock:
                if error is None:
                    tally.kinds["answered"] += 1
                    tally.kinds["wrong"] += not np.array_equal(result.as_numpy("image")[0], expected[index])
                    tally.seconds.append(taken)
                else:
                    full = "maximum queue size" in error.message().lower()
                    late = "timeout" in error.message().lower()
                    tally.kinds["refused" if full else "expired" if late else "failed"] += 1
            waiting.release()

        return record

    with grpc.InferenceServerClient(address) as client:
        before = batches(client)
        began, sent = time.monotonic(), 0
        for at in arrivals(draw, rate, seconds):
            time.sleep(max(began + at - time.monotonic(), 0))
            index = draw.randrange(DISTINCT)
            inputs = [grpc.InferInput("class", [1, 1], "INT64"), grpc.InferInput("seed", [1, 1], "UINT64")]
            inputs[0].set_data_from_numpy(np.array([[index % count]], np.int64))
            inputs[1].set_data_from_numpy(np.array([[1000 + index]], np.uint64))
            with lock:
                tally.kinds["arrived"] += 1
            sent += 1
            record = ended(index, time.monotonic())
            client.async_infer("loaded", inputs, record, parameters={"steps": steps}, client_timeout=3 * TIMEOUT)
        for _ in range(sent):
            waiting.acquire(timeout=4 * TIMEOUT)
        lasted = time.monotonic() - began
        runs = batches(client)
        runs.subtract(before)
    summary = tally.summary(lasted)
    del summary["memory_mb"]
    return summary | {"executions_by_batch": {size: count for size, count in sorted(runs.items()) if count}}


def batches(client: Any) -> "Counter[int]":
    """Return the number of executions of the model by batch size."""
    found = client.get_inference_statistics("loaded", as_json=True)["model_stats"][0].get("batch_stats", [])
    return Counter({int(one["batch_size"]): int(one["compute_infer"]["count"]) for one in found})


if __name__ == "__main__":
    main()
