"""Compare `sg-export sample` with a bare loop, and kill one of two Ray nodes within a job.

    python -m benchmarks.sample_job --output benchmarks/results/sample_job.json

The bare loop opens the bundle and calls the pipeline for one batch after another, and discards the
images. A job of the same images opens the bundle, samples, encodes and writes them. Both are timed
in turn, in this process; the overhead is the median of the ratios of neighbours, with quartiles.
The model is `glyphs`. Its images are small, so a job has the most files for its time.

The Ray cluster has two nodes on this machine, each with one core. The second is killed when a
quarter of the shards is complete. The files of that job are compared with those of the job in this
process. `--part` runs one of the two.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import machine
from sg_export import CompileOptions, compile
from sg_runtime import Pipeline
from sg_runtime.bulk import FORMATS, Request, run_job

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "tests/sg_runtime/fixtures/ray_cluster.py"
SHARD = 16
"""Images in a shard of the job on two nodes."""

LIMIT = 1800.0
"""Seconds that the benchmark waits for something."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["overhead", "ray"], nargs="+", default=["overhead", "ray"])
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    content: dict[str, object] = {
        "machine": machine("numpy", "onnxruntime", "pillow", "ray"),
        "setup": {name: getattr(options, name) for name in ("count", "steps", "rounds", "threads")},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = compile("glyphs", CompileOptions(folder / "bundle", (0.5,))).path
        request = Request(bundle, options.count, steps=options.steps, threads=options.threads)
        if "overhead" in options.part:
            content["overhead"] = {
                format: overhead(replace(request, format=format), folder, options.rounds) for format in FORMATS
            }
        if "ray" in options.part:
            content["ray"] = killed_node(request, folder)
    print(json.dumps(content, indent=1))
    if options.output:
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def overhead(request: Request, folder: Path, rounds: int) -> dict[str, object]:
    """Time a bare loop and a job in turn. The first round is a warm-up and is not counted."""
    outputs = iter(range(rounds + 1))
    sides: dict[str, Callable[[], object]] = {
        "loop": lambda: bare_loop(request),
        "job": lambda: run_job(request, folder / f"{request.format}-{next(outputs)}"),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, run in sides.items():
            began = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - began)
    ratios = [job / loop - 1 for loop, job in zip(times["loop"][1:], times["job"][1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {
        **{f"{side}_images_per_second": round(request.count / statistics.median(times[side][1:]), 2) for side in sides},
        "overhead": round(middle, 4),
        "overhead_quartiles": [round(low, 4), round(high, 4)],
    }


def bare_loop(request: Request) -> None:
    """Sample the images of a request, and discard them."""
    pipe = Pipeline.load(request.bundle, threads=request.threads)
    labels = pipe.bundle.manifest.model.labels.count
    for start in range(0, request.count, pipe.batch):
        images = range(start, start + pipe.batch)  # the last run is as large, as in a job
        pipe([image % labels for image in images], images, steps=request.steps)


def killed_node(request: Request, folder: Path) -> dict[str, object]:
    """Run a job on two nodes, kill one, and compare the files with those of a job without Ray."""
    words = ["sample", str(request.bundle), "--count", str(request.count), "--steps", str(request.steps)]
    words += ["--threads", "1", "--shard", str(SHARD), "--format", "webdataset"]
    whole, out = folder / "whole", folder / "out"
    subprocess.run([sys.executable, "-m", "sg_export", *words, "-q", "-o", str(whole)], check=True, timeout=LIMIT)
    shards = len(list(whole.glob("*.tar")))
    with subprocess.Popen(
        [sys.executable, str(CLUSTER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        command = [sys.executable, "-m", "sg_export", *words, "-o", str(out), "--ray", address]
        began = time.monotonic()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
            assert job.stderr is not None
            while len(list(out.glob("*.tar"))) < shards // 4:
                if job.poll() is not None or time.monotonic() - began > LIMIT:
                    job.kill()
                    raise SystemExit(f"the job ended too soon, or never began: {job.stderr.read()}")
                time.sleep(0.1)
            cluster.stdin.write("kill\n")
            cluster.stdin.flush()
            lines = job.stderr.read().splitlines()
        seconds = time.monotonic() - began
        cluster.stdin.close()
        cluster.wait(60)
    ours, theirs = (
        {path.name: path.read_bytes() for path in side.iterdir() if path.name != "job.lock"} for side in (whole, out)
    )
    return {
        "exit_code": job.returncode,
        "shards": shards,
        "images_per_shard": SHARD,
        "nodes_lost": sum("of the Ray cluster was lost" in line for line in lines),
        "shards_sampled_again": len(
            {match[1] for line in lines if (match := re.search(r"shard (\d+) was lost", line))}
        ),
        "files_equal_to_those_without_ray": ours == theirs,
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
