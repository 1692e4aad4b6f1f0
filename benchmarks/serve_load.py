"""Load test of serving: the service core next to the bare pipeline, and `sg-export serve`.

    sg-export build --sparsity 0.5 -o glyphs-bundle
    python -m benchmarks.serve_load glyphs-bundle --output benchmarks/results/serve_load.json

It measures, each in a process of its own:

* saturation: images per second of the bare pipeline and of the service core, in turn;
* open loop: requests that arrive at random times (Poisson), at 0.7 and 1.3 of the core's
  throughput at saturation, first to the core, then by HTTP. In the middle of the first run by HTTP
  the only replica is killed.

Every image is compared with one that the pipeline made alone. A request is lost if it has neither
an answer nor an error. Everything runs on this machine and on its loopback address.
"""

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import machine
from benchmarks.processes import descendants, resident_bytes
from sg_runtime.errors import DeadlineError, QueueFullError
from sg_runtime.pipeline import Pipeline
from sg_runtime.service import Answer, Request, Service, ServiceSettings

SHARES = (0.7, 1.3)
"""Rates of arrival, as shares of the throughput at saturation."""

DISTINCT = 64
"""Number of distinct requests, for which the expected image is known."""

TIMEOUT = 30.0
"""Seconds within which the run of a request must begin."""

SAMPLES = 20
"""Number of times that memory is read in a run."""


@dataclass(frozen=True)
class Load:
    """What is measured.

    bundle: the bundle.
    batch, steps: images of a run, steps of a request.
    queue: largest number of waiting images.
    seconds: length of each open-loop run.
    rounds: number of rounds of the comparison at saturation, and round_seconds the length of each.
    """

    bundle: Path
    batch: int
    steps: int
    queue: int
    seconds: float
    rounds: int
    round_seconds: float


@dataclass
class Tally:
    """Outcomes of requests: their number by kind, and the seconds of those that were answered."""

    kinds: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def summary(self, lasted: float) -> dict[str, Any]:
        """Return the figures of a run that lasted so many seconds."""
        arrived = self.kinds["arrived"]
        ended = sum(count for kind, count in self.kinds.items() if kind not in ("arrived", "wrong"))
        quantiles = np.quantile(self.seconds, (0.5, 0.99)) if self.seconds else (None, None)
        return {
            "seconds": round(lasted, 1),
            "requests": dict(sorted(self.kinds.items())),
            "lost": arrived - ended,
            "wrong": self.kinds["wrong"],
            "images_per_second": round(self.kinds["answered"] / lasted, 3),
            "p50_ms": None if quantiles[0] is None else round(1e3 * float(quantiles[0]), 1),
            "p99_ms": None if quantiles[1] is None else round(1e3 * float(quantiles[1]), 1),
            "memory_mb": [round(size / 1e6, 1) for size in self.memory],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="length of each open-loop run")
    parser.add_argument("--rounds", type=int, default=10, help="rounds at saturation")
    parser.add_argument("--round-seconds", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    load = Load(
        options.bundle.absolute(),
        options.batch,
        options.steps,
        options.queue,
        options.seconds,
        options.rounds,
        options.round_seconds,
    )
    result: dict[str, Any] = {
        "machine": machine("numpy", "onnxruntime", "ray", "starlette", "uvicorn"),
        "load": {"batch": load.batch, "steps": load.steps, "queue": load.queue, "threads": 1},
    }

    def report(name: str, found: Any) -> None:
        result[name] = found
        print(json.dumps({name: found}, indent=1), flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    with working(bare_worker, load) as bare, working(core_worker, load) as core:
        saturation = saturated(bare, core, load)
        report("saturation", saturation)
        rate = saturation["core_images_per_second"]
        for share in SHARES:
            core.send(("open", share * rate))
            report(f"core at {share:g}", {"arrivals_per_second": round(share * rate, 2)} | core.recv())
        core.send(("images",))
        expected = core.recv()
    for share in SHARES:
        found = by_http(load, share * rate, expected, kill=share < 1)
        report(f"http at {share:g}", {"arrivals_per_second": round(share * rate, 2)} | found)


@contextmanager
def working(target: Callable[[Load, Connection], None], load: Load) -> Iterator[Connection]:
    """Start a worker in a new process and yield the connection to it. It is ready."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(load, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield ours
    finally:
        ours.close()
        process.join(60)


def saturated(bare: Connection, core: Connection, load: Load) -> dict[str, Any]:
    """Compare pipeline and core at saturation, in turn, so that both see the same machine."""
    rates: dict[str, list[float]] = {"bare": [], "core": []}
    for number in range(load.rounds):
        for name in ("bare", "core") if number % 2 else ("core", "bare"):
            worker = {"bare": bare, "core": core}[name]
            worker.send(("saturate", load.round_seconds))
            rates[name].append(worker.recv())
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    ratios = [core_rate / bare_rate for core_rate, bare_rate in zip(rates["core"], rates["bare"], strict=True)]
    return {
        "bare_images_per_second": round(medians["bare"], 3),
        "core_images_per_second": round(medians["core"], 3),
        "core_to_bare": round(float(np.median(ratios)), 4),
        "rounds": {name: [round(value, 3) for value in values] for name, values in rates.items()},
    }


def opened(load: Load) -> Pipeline:
    """Return the pipeline, warm."""
    pipe = Pipeline.load(load.bundle, "cpu", batch=load.batch, threads=1)
    pipe.warmup(load.batch, steps=1)
    return pipe


def asked(load: Load) -> list[Request]:
    """Return the distinct requests, of two groups."""
    return [
        Request((index % 62,), (1000 + index,), steps=load.steps, scale=2.0 if index % 4 else 3.0)
        for index in range(DISTINCT)
    ]


def bare_worker(load: Load, parent: Connection) -> None:
    """Run batches of the bare pipeline, as long as it is told to."""
    pipe = opened(load)
    parent.send("ready")
    for _, seconds in commands(parent):
        images, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            pipe(list(range(load.batch)), range(images, images + load.batch), steps=load.steps)
            images += load.batch
        parent.send(images / (time.monotonic() - began))


def core_worker(load: Load, parent: Connection) -> None:
    """Run the service core: at saturation, or with requests at random times."""
    pipe = opened(load)
    requests = asked(load)
    expected = [
        pipe(
            list(request.conditions) * load.batch,
            list(request.seeds) * load.batch,
            steps=load.steps,
            scale=request.scale,
        )[0]
        for request in requests
    ]
    with Service(pipe, ServiceSettings(queue=load.queue)) as service:
        parent.send("ready")
        for name, *arguments in commands(parent):
            if name == "saturate":
                parent.send(saturate(service, load, *arguments))
            elif name == "open":
                parent.send(open_loop(service, load, requests, expected, *arguments))
            else:
                parent.send(expected)


def commands(parent: Connection) -> Iterator[Any]:
    """Yield what the parent sends until it closes the connection."""
    try:
        while True:
            yield parent.recv()
    except EOFError:
        return


def saturate(service: Service, load: Load, seconds: float) -> float:
    """Return the images per second of a core whose queue always has a full run."""
    room, answered = threading.Semaphore(4 * load.batch), Counter[str]()

    def done(_: object) -> None:
        answered["images"] += 1
        room.release()

    began, seed = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        room.acquire()
        request = Request((seed % 62,), (seed,), steps=load.steps)
        service.submit(request).add_done_callback(done)
        seed += 1
    images, lasted = answered["images"], time.monotonic() - began
    for _ in range(4 * load.batch):  # the rest is not counted
        room.acquire()
    return images / lasted


def open_loop(
    service: Service, load: Load, requests: Sequence[Request], expected: Sequence[Any], rate: float
) -> dict[str, Any]:
    """Send requests at random times to the core, whether or not it keeps up."""
    tally, lock, before = Tally(), threading.Lock(), service.statistics()
    draw, futures = random.Random(0), []

    def ended(index: int, arrived: float) -> Callable[[Any], None]:
        def record(future: Any) -> None:
            seconds, error = time.monotonic() - arrived, future.exception()
            with lock:
                if error is None:
                    answer: Answer = future.result()
                    tally.kinds["answered"] += 1
                    tally.kinds["wrong"] += not np.array_equal(answer.images[0], expected[index])
                    tally.seconds.append(seconds)
                else:
                    tally.kinds["expired" if isinstance(error, DeadlineError) else "failed"] += 1

        return record

    began = time.monotonic()
    for at in arrivals(draw, rate, load.seconds):
        time.sleep(max(began + at - time.monotonic(), 0))
        if len(tally.memory) * load.seconds <= at * SAMPLES:
            tally.memory.append(resident_bytes(os.getpid()))
        index, arrived = draw.randrange(DISTINCT), time.monotonic()
        with lock:
            tally.kinds["arrived"] += 1
        try:
            futures.append(service.submit(requests[index], timeout=TIMEOUT))
        except QueueFullError:
            with lock:
                tally.kinds["refused"] += 1
            continue
        futures[-1].add_done_callback(ended(index, arrived))
        futures = [future for future in futures if not future.done()]
    for future in futures:
        future.exception(2 * TIMEOUT)
    lasted = time.monotonic() - began
    time.sleep(0.1)  # the last callbacks
    runs = Counter(service.statistics().runs)
    runs.subtract(before.runs)
    more = {
        "longest_queue": service.statistics().longest,
        "runs_by_images": {k: v for k, v in sorted(runs.items()) if v},
    }
    return tally.summary(lasted) | more


def arrivals(draw: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """Yield the times of a Poisson process in seconds."""
    at = draw.expovariate(rate)
    while at < seconds:
        yield at
        at += draw.expovariate(rate)


def by_http(load: Load, rate: float, expected: Sequence[Any], *, kill: bool) -> dict[str, Any]:
    """Send requests at random times to `sg-export serve`. kill: kill its replica in the middle."""
    options = ["--threads", "1", "--batch", load.batch, "--queue", load.queue, "--timeout", TIMEOUT, "--port", 0]
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("w") as log:
        command = [sys.executable, "-m", "sg_export", "serve", str(load.bundle), *map(str, options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, (Path(scratch) / "log").read_text()
            return asyncio.run(http_loop(load, rate, expected, address, process.pid, kill))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def http_loop(
    load: Load, rate: float, expected: Sequence[Any], address: str, server: int, kill: bool
) -> dict[str, Any]:
    """Send requests at random times, whether or not the server keeps up."""
    import httpx2

    tally, draw, tasks, killed = Tally(), random.Random(0), set[asyncio.Task[None]](), False
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx2.AsyncClient(base_url=address, timeout=3 * TIMEOUT, limits=limits, trust_env=False) as client:

        async def ask(index: int) -> None:
            request = asked(load)[index]
            body = {"class": request.conditions[0], "seed": request.seeds[0], "steps": request.steps}
            arrived = time.monotonic()
            answer = await client.post("/v1/images/generations", json=body | {"scale": request.scale})
            kinds = {200: "answered", 429: "refused", 504: "expired"}
            tally.kinds[kinds.get(answer.status_code, f"status {answer.status_code}")] += 1
            if answer.status_code == 200:
                tally.seconds.append(time.monotonic() - arrived)
                file = base64.b64decode(answer.json()["data"][0]["b64_json"])
                image = np.asarray(Image.open(io.BytesIO(file)))
                tally.kinds["wrong"] += not np.array_equal(image, expected[index][..., 0])

        began = time.monotonic()
        for at in arrivals(draw, rate, load.seconds):
            await asyncio.sleep(max(began + at - time.monotonic(), 0))
            if len(tally.memory) * load.seconds <= at * SAMPLES:
                tally.memory.append(sum(map(resident_bytes, [server, *replicas(server)])))
            if kill and not killed and at > load.seconds / 2:
                for replica in replicas(server):
                    os.kill(replica, signal.SIGKILL)
                killed = True
            tally.kinds["arrived"] += 1
            task = asyncio.ensure_future(ask(draw.randrange(DISTINCT)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks:
            await asyncio.wait({*tasks}, timeout=4 * TIMEOUT)
        lasted = time.monotonic() - began
    return tally.summary(lasted) | {"replica_killed": killed}


def replicas(server: int) -> list[int]:
    """Return the processes of the replicas of a server."""
    return [pid for pid, command in descendants(server).items() if "ServeReplica:" in command]


if __name__ == "__main__":
    main()
