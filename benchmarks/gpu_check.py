"""Run checks that need a GPU: `python -m benchmarks.gpu_check PART [...]`.

driver     Driver calls, DLPack, calls that end another thread's capture, and the lower bound of the
           time of cuBLAS, attention and launches.
ort        ONNX Runtime: nodes that do not run on the GPU, results, PyTorch streams, threads, and
           allocations during a capture.
teardown   Pipelines with captured graphs are dropped, each in a separate process.
micro      Attention, scatter, gather, bias and GELU, each in several forms.
build-xl   Build the bundles of DiT-XL/2.
xl         DiT-XL/2, FP16, one image: milliseconds per step with and without CUDA graphs, memory,
           kernels.
eager      `sg-export bench` of the same bundles compared with PyTorch in BF16.
compiled   `sg-export bench` of the same bundles compared with torch.compile. This takes minutes.
outer      One CUDA graph of the runtime around all runs of ONNX Runtime.

Each finding is one JSON line. An error in a check is also a finding, and the other checks go on.
The lines are appended to $OUT/gpu_check.jsonl ($OUT defaults to /tmp). The bundles of XL/2 are kept
in $XL (default: the folder for temporary files) and built if they are missing. Needs PyTorch with
CUDA. All parts except `driver` need onnxruntime-gpu >= 1.31.1.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path[:0] = ["runtime", "engines", "calibration", "."]
XL = Path(os.environ.get("XL", tempfile.gettempdir())) / "xl"
SETTINGS = ((0.5, 0.9), (0.0, 0.5))
"""Sparsities of the strong and the weak branch."""
OUT = Path(os.environ.get("OUT", "/tmp")) / "gpu_check.jsonl"
BEGAN = time.time()


def say(name, **facts):
    line = json.dumps({"check": name, "at": round(time.time() - BEGAN, 1), **facts}, default=str)
    print(line, flush=True)
    with OUT.open("a") as stream:
        stream.write(line + "\n")


def check(work):
    def fenced(*arguments):
        try:
            found = work(*arguments)
            say(work.__name__, ok=True, **(found or {}))
        except BaseException as error:
            say(work.__name__, ok=False, error=repr(error)[:600], where=traceback.format_exc()[-700:])

    return fenced


def rel(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# -------------------------------- driver, DLPack, capture: no ONNX Runtime


@check
def machine():
    import cuda.bindings
    import torch

    smi = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    return {
        "gpu": subprocess.run(smi, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "cuda_bindings": cuda.bindings.__version__,
    }


@check
def dlpack_both_ways():
    import torch

    from sg_runtime.devices.cuda import CudaMemory

    memory, side = CudaMemory(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # delays the values in torch's stream
        tensor = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    with torch.cuda.stream(side):
        held = memory.hold(tensor)  # must make our stream wait for `side`
    found = memory.download(held)
    back = torch.from_dlpack(held)
    return {"ordered": bool((found == np.arange(1 << 20)).all()), "same_memory": back.data_ptr() == tensor.data_ptr()}


@check
def pageable_upload_may_be_overwritten():
    """Check that the host may overwrite its memory as soon as cuMemcpyHtoDAsync returns.

    The stream still has earlier work to do at that time.
    """
    import torch

    from sg_runtime.devices.cuda import CudaMemory

    own = torch.cuda.Stream()
    memory, bad = CudaMemory(0, own), {}
    for size in (28, 1 << 12, 1 << 16, 1 << 17, 1 << 22):
        wrong = 0
        for turn in range(60):
            target = memory.empty((size,), np.uint8)
            source = np.full(size, turn % 250, np.uint8)
            with torch.cuda.stream(own):
                torch.cuda._sleep(3_000_000)
            memory.upload(source, target)
            source[:] = 255
            wrong += int((memory.download(target) != turn % 250).any())
        bad[size] = wrong
    return {"wrong_by_size": bad}


@check
def frees_and_allocations_during_captures():
    """Check whether cuMemFree or cudaMalloc of another thread ends a capture.

    The runtime captures in mode THREAD_LOCAL, ONNX Runtime in mode GLOBAL (0).
    """
    import cuda.bindings.driver as driver
    import torch

    from sg_runtime.devices.cuda import CudaMemory

    memory, found = CudaMemory(), {}
    a, b = memory.empty((1 << 20,), np.uint8), memory.empty((1 << 20,), np.uint8)
    for name, mode in {"global": 0, "thread_local": 1}.items():
        for action in ("none", "free", "torch_malloc", "free_same_thread"):
            victim = [memory.empty((1 << 20,), np.uint8)]

            def other(action=action, victim=victim):
                memory.enter()
                if action.startswith("free"):
                    victim.clear()
                elif action == "torch_malloc":
                    torch.empty(300 << 20, dtype=torch.uint8, device="cuda")

            driver.cuStreamBeginCapture(memory.stream, driver.CUstreamCaptureMode(mode))
            memory.copy(a, b)
            try:
                if action == "free_same_thread":
                    victim.clear()
                elif action != "none":
                    thread = threading.Thread(target=other)
                    thread.start()
                    thread.join()
            except BaseException as error:
                found[f"{name}/{action}/error"] = repr(error)[:160]
            status, *_ = driver.cuStreamEndCapture(memory.stream)
            found[f"{name}/{action}"] = status.name
            torch.cuda.empty_cache()
    return found


@check
def floor_of_products_and_attention():
    """Measure the lower bound of XL/2's time: matmuls, attention and launches.

    All matmuls run in one CUDA graph with the rows of both settings, each with a separate weight.
    """
    import torch
    import torch.nn.functional as F

    shapes, found = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152)), {}
    for name, rows in {"0.5/0.9 (154 routed)": 154, "0/0.5 (384)": 384, "one pass (256)": 256}.items():
        weights = [[torch.randn(k, n, device="cuda", dtype=torch.half) * 0.02 for k, n in shapes] for _ in range(28)]
        inputs = {k: torch.randn(rows, k, device="cuda", dtype=torch.half) for k in (1152, 4608)}

        def work(weights=weights, inputs=inputs):
            for block in weights:
                for weight in block:
                    inputs[weight.shape[0]] @ weight

        found[f"products {name}"] = graph_ms(work)
        read = torch.empty(sum(w.numel() for block in weights for w in block), device="cuda", dtype=torch.half)
        found["read all weights once"] = graph_ms(lambda read=read: read.sum())
        del weights
    for s in (256, 128, 26):
        q = torch.randn(1, 16, s, 72, device="cuda", dtype=torch.half)
        found[f"28 SDPA of {s}"] = graph_ms(lambda q=q: [F.scaled_dot_product_attention(q, q, q) for _ in range(28)])
    x = torch.randn(384, 1152, device="cuda")
    found["100 tiny dependent kernels"] = graph_ms(lambda: [x.add_(1) for _ in range(100)])
    return {key: round(value, 4) for key, value in found.items()}


def graph_ms(work, turns=30):
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work(), work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times = []
    for _ in range(turns):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(), graph.replay(), end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


# -------------------------------- ONNX Runtime's CUDA provider, on the small model


def small(batch, folder, precision="fp32"):
    from sg_export import CompileOptions, compile

    output = Path(folder) / f"{batch}-{precision}"
    if output.exists():
        return output
    return compile("glyphs", CompileOptions(output, (0.5,), batch=batch, precision=precision)).path


@check
def ort_loads(folder):
    import onnxruntime as ort

    from sg_runtime.backends import ort as ours
    from sg_runtime.devices.cuda import CudaMemory

    memory, found = CudaMemory(), {"version": ort.__version__, "file": ort.__file__, "build": ort.get_build_info()}
    for batch in (2, None):
        bundle = small(batch, folder)
        for graph in sorted(bundle.glob("graphs/*.onnx")):
            for capture in "01":
                options = {
                    "device_id": "0",
                    "user_compute_stream": str(memory.stream),
                    "enable_cuda_graph": capture,
                    "use_tf32": "0",
                }
                try:
                    session = ours.open_session(graph, provider=ours.PROVIDERS["onnxruntime-cuda"], options=options)
                    found[f"{batch}/{graph.stem}/{capture}"] = (
                        ours.strays_of(session, "CUDAExecutionProvider") or "all on CUDA"
                    )
                except Exception as error:
                    found[f"{batch}/{graph.stem}/{capture}"] = str(error)[:300]
    return found


@check
def ort_is_right(folder):
    from sg_runtime import Pipeline

    found = {}
    for precision in ("fp32", "fp16"):
        bundle = small(2, folder, precision)
        for sampler in ("euler", "heun"):
            wanted = Pipeline.load(bundle, "cpu").sample([0, 1], [5, 6], steps=8, sampler=sampler)
            for capture in (True, False):
                pipe = Pipeline.load(bundle, "cuda", backend="onnxruntime-cuda", capture=capture)
                runs = [pipe.sample([0, 1], [5, 6], steps=8, sampler=sampler) for _ in range(3)]
                pipe.guided(
                    pipe.initial_noise([1, 2]), pipe.prepare_once(0.5, [0, 1])
                )  # another run between replays: CudaAsyncBuffer (#32121)
                runs.append(pipe.sample([0, 1], [5, 6], steps=8, sampler=sampler))
                found[f"{precision}/{sampler}/{'graph' if capture else 'plain'}"] = [
                    f"{rel(run, wanted):.1e}" for run in runs
                ]
    return found


@check
def ort_in_torchs_streams(folder):
    """Check runs in PyTorch streams.

    The documented call passes the default stream, 0. ONNX Runtime interprets 0 as no stream.
    """
    import torch

    from sg_runtime import Pipeline

    bundle, found = small(2, folder), {}
    wanted = Pipeline.load(bundle, "cpu").sample([0, 1], [5, 6], steps=8)
    for name, stream in {"torch current (0)": torch.cuda.current_stream(), "torch side": torch.cuda.Stream()}.items():
        for capture in (True, False):
            try:
                pipe = Pipeline.load(bundle, "cuda", backend="onnxruntime-cuda", stream=stream, capture=capture)
                found[f"{name}/{capture}"] = [
                    f"{rel(pipe.sample([0, 1], [5, 6], steps=8), wanted):.1e}" for _ in range(3)
                ]
            except Exception as error:
                found[f"{name}/{capture}"] = repr(error)[:300]
    return found


@check
def ort_threads(folder):
    """Measure the first run of new threads, and the memory that each thread does not free.

    Captures are per thread.
    """
    import torch

    from sg_runtime import Pipeline

    pipe = Pipeline.load(small(2, folder), "cuda", backend="onnxruntime-cuda")
    pipe.warmup(2, steps=40)

    def timed():
        began = time.perf_counter()
        pipe.sample([0, 1], [5, 6], steps=40)
        return (time.perf_counter() - began) * 1e3

    main, fresh, free = [timed() for _ in range(3)], [], [torch.cuda.mem_get_info()[0]]
    for _ in range(8):
        thread = threading.Thread(target=lambda: fresh.append(timed()))
        thread.start()
        thread.join()
        free.append(torch.cuda.mem_get_info()[0])
    return {
        "main_ms": main,
        "first_run_of_new_threads_ms": fresh,
        "MB_lost_by_thread": [(a - b) / 1e6 for a, b in pairwise(free)],
    }


@check
def ort_capture_disturbed(folder):
    """Check what happens if another thread allocates while ONNX Runtime captures.

    The findings are the error, and whether the pipeline works afterwards.
    """
    import torch

    from sg_runtime import Pipeline

    pipe, stop, found = Pipeline.load(small(2, folder), "cuda", backend="onnxruntime-cuda"), threading.Event(), []

    def disturb():
        while not stop.is_set():
            try:
                torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
                torch.cuda.empty_cache()
            except Exception as error:
                found.append(f"torch: {error!r}"[:200])

    thread = threading.Thread(target=disturb)
    thread.start()
    for attempt in range(2):
        if attempt:
            stop.set()
            thread.join()
        try:
            pipe.sample([0, 1], [5, 6], steps=40)
            found.append("sample: fine")
        except Exception as error:
            found.append(f"sample: {error!r}"[:400])
    return {"said": found[:3] + found[-3:], "count": len(found)}


# -------------------------------- XL/2


def kernels(work, most=25):
    """Profile one call: number of kernels, sum of their times, and the most expensive by name."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        work()
        torch.cuda.synchronize()
    rows = [
        (e.key[:110], e.count, e.self_device_time_total) for e in prof.key_averages() if e.self_device_time_total > 0
    ]
    rows.sort(key=lambda row: -row[2])
    return {"count": sum(row[1] for row in rows), "us": sum(row[2] for row in rows), "top": rows[:most]}


def xl_bundle(strong, weak, precision="fp16"):
    """Return the bundle of a setting and its checkpoint. The bundle is built if it is missing."""
    from benchmarks.guided_step import random_checkpoint
    from sg_export import CompileOptions, compile

    own = XL / f"{strong:g}-{weak:g}-{precision}"
    own.mkdir(parents=True, exist_ok=True)
    if not (own / "bundle").exists():
        checkpoint, overrides = random_checkpoint("XL/2", own)
        options = CompileOptions(
            own / "bundle",
            (weak,),
            strong_sparsity=(strong,),
            precision=precision,
            batch=1,
            overrides=overrides,
            steps=40,
        )
        compile(checkpoint, options)
    return own / "bundle", own / "random.pt"


@check
def xl_build(strong, weak):
    began = time.time()
    xl_bundle(strong, weak)
    return {"setting": f"{strong:g}/{weak:g}", "seconds": round(time.time() - began, 1)}


@check
def xl(strong, weak):
    import torch

    from sg_runtime import Pipeline

    bundle, _ = xl_bundle(strong, weak)
    found = {"setting": f"{strong:g}/{weak:g}"}
    for capture in (True, False):
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        pipe = Pipeline.load(bundle, "cuda", backend="onnxruntime-cuda", capture=capture, verify_hashes=False)
        began = time.perf_counter()
        pipe.sample([1], [1], steps=40)
        found[f"first_s/{capture}"] = time.perf_counter() - began
        times, asked = [], []
        for _ in range(5):
            began, marks = time.perf_counter(), []
            pipe.sample([1], [1], steps=40, progress=lambda done, total, marks=marks: marks.append(time.perf_counter()))
            times.append((time.perf_counter() - began) * 1e3 / 40)
            asked.append((marks[-1] - marks[0]) * 1e3 / 39)
        found[f"ms_per_step/{capture}"] = statistics.median(times)
        # If this is close to the time of a step, something waits in every step.
        found[f"ms_to_ask_for_a_step/{capture}"] = statistics.median(asked)
        found[f"MB/{capture}"] = (before - torch.cuda.mem_get_info()[0]) / 1e6
        if not capture:
            found["kernels_of_2_steps_and_condition"] = kernels(lambda pipe=pipe: pipe.sample([1], [1], steps=2), 40)
    return found


@check
def xl_beside_torch(strong, weak, *baselines):
    """Time complete runs with `sg-export bench`, alternating with PyTorch in BF16."""
    from dataclasses import asdict

    from sg_export.bench.measure import bench

    bundle, checkpoint = xl_bundle(strong, weak)
    result = bench(
        bundle,
        device="cuda",
        backend="onnxruntime-cuda",
        images=1,
        steps=40,
        runs=7,
        baselines=baselines,
        checkpoint=checkpoint,
    )
    return {"setting": f"{strong:g}/{weak:g}", **(asdict(result) | {"bundle": ""})}


# -------------------------------- single patterns, each in several forms


def micro_models():
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    d, heads, size = 1152, 16, 72
    rng = np.random.default_rng(0)

    def ints(name, *values):
        return nh.from_array(np.array(values, np.int64), name)

    def model(name, inputs, out, nodes, inits=(), opset=20):
        graph = h.make_graph(
            nodes,
            name,
            [h.make_tensor_value_info(n, t, s) for n, t, s in inputs],
            [h.make_tensor_value_info("y", out[0], out[1])],
            list(inits),
        )
        made = h.make_model(graph, opset_imports=[h.make_opsetid("", opset), h.make_opsetid("com.microsoft", 1)])
        made.ir_version = 10 if opset < 23 else 11
        return name, made, inputs, out

    n, made = h.make_node, []
    for s in (256, 128):
        qkv = [("qkv", T.FLOAT16, [1, s, 3 * d])]
        split = n("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3)
        plain = [split]
        for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            plain += [n("Reshape", [name, "s4"], [name + "4"]), n("Transpose", [name + "4"], [name + "t"], perm=perm)]
        plain += [
            n("Mul", ["qt", "scale"], ["qs"]), n("MatMul", ["qs", "kt"], ["a"]), n("Softmax", ["a"], ["p"], axis=-1),
            n("MatMul", ["p", "vt"], ["o"]), n("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
            n("Reshape", ["ot", "s3"], ["y"]),
        ]  # fmt: skip
        inits = [ints("s4", 1, s, heads, size), ints("s3", 1, s, d), nh.from_array(np.float16(size**-0.5), "scale")]
        made.append(model(f"attention {s} ours", qkv, (T.FLOAT16, [1, s, d]), plain, inits))
        mha = [split, n("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=heads)]
        made.append(model(f"attention {s} MultiHeadAttention", qkv, (T.FLOAT16, [1, s, d]), mha))
        std = [split, n("Attention", ["q", "k", "v"], ["y"], q_num_heads=heads, kv_num_heads=heads)]
        made.append(model(f"attention {s} Attention-23", qkv, (T.FLOAT16, [1, s, d]), std, opset=23))
    total, longest = 256 + 128, 256
    offsets = np.r_[np.arange(256), 256 + np.arange(128), 384 + np.arange(128)].reshape(2, longest).astype(np.int32)
    packed = [
        n(
            "PackedMultiHeadAttention",
            ["qkv", "", "", "", "offset", "cumulative"],
            ["y"],
            domain="com.microsoft",
            num_heads=heads,
        )
    ]
    inits = [nh.from_array(offsets, "offset"), nh.from_array(np.array([0, 256, 384], np.int32), "cumulative")]
    made.append(
        model(
            "attention 256+128 PackedMultiHeadAttention",
            [("qkv", T.FLOAT16, [total, heads, 3, size])],
            (T.FLOAT16, [total, d]),
            packed,
            inits,
        )
    )
    for k in (128, 26):
        some = [("x", T.FLOAT, [1, 256, d]), ("u", T.FLOAT, [1, k, d]), ("keep", T.INT64, [1, k, 2])]
        keep = [n("ScatterND", ["x", "keep", "u"], ["y"])]
        made.append(model(f"scatter {k} ScatterND", some, (T.FLOAT, [1, 256, d]), keep))
        some = [("x", T.FLOAT, [1, 256, d]), ("u", T.FLOAT, [1, k, d]), ("inverse", T.INT64, [256])]
        keep = [n("Concat", ["x", "u"], ["xu"], axis=1), n("Gather", ["xu", "inverse"], ["y"], axis=1)]
        made.append(model(f"scatter {k} Concat+Gather", some, (T.FLOAT, [1, 256, d]), keep))
        some = [("x", T.FLOAT, [1, 256, d]), ("keep", T.INT64, [1, k, 2])]
        made.append(model(f"gather {k} GatherND", some, (T.FLOAT, [1, k, d]), [n("GatherND", ["x", "keep"], ["y"])]))
        some = [("x", T.FLOAT, [1, 256, d]), ("keep", T.INT64, [k])]
        made.append(
            model(f"gather {k} Gather", some, (T.FLOAT, [1, k, d]), [n("Gather", ["x", "keep"], ["y"], axis=1)])
        )
    weight = [
        nh.from_array((rng.standard_normal((d, 4 * d)) * 0.02).astype(np.float16), "w"),
        nh.from_array(np.ones(4 * d, np.float16), "b"),
    ]
    rows = [("x", T.FLOAT16, [1, total, d])]
    made.append(
        model(
            "fc1 MatMul+Add+Gelu",
            rows,
            (T.FLOAT16, [1, total, 4 * d]),
            [n("MatMul", ["x", "w"], ["m"]), n("Add", ["m", "b"], ["g"]), n("Gelu", ["g"], ["y"], approximate="tanh")],
            weight,
        )
    )
    made.append(
        model(
            "fc1 MatMul+FastGelu(bias)",
            rows,
            (T.FLOAT16, [1, total, 4 * d]),
            [n("MatMul", ["x", "w"], ["m"]), n("FastGelu", ["m", "b"], ["y"], domain="com.microsoft")],
            weight,
        )
    )
    return made


@check
def micro_one(name, made, inputs, out):
    import onnx
    import torch

    from benchmarks.cuda_forms import captured_session, run_graph

    kinds = {1: torch.float32, 10: torch.float16, 7: torch.int64}
    stream = torch.cuda.Stream()
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        onnx.save(made, file.name)
        session = captured_session(Path(file.name), stream)
    binding, held = session.io_binding(), []
    for key, kind, shape in inputs:
        if kind == 7:
            k = shape[1] if len(shape) == 3 else shape[0]
            rows = torch.randperm(256)[:k].sort()[0] if k < 256 else torch.arange(256)
            tensor = torch.stack([torch.zeros_like(rows), rows], -1)[None] if len(shape) == 3 else rows
            tensor = tensor.cuda()
        else:
            tensor = torch.randn(*shape, device="cuda").to(kinds[kind])
        held.append(tensor)
        binding.bind_input(key, "cuda", 0, kind, shape, tensor.data_ptr())
    held.append(torch.empty(out[1], device="cuda", dtype=kinds[out[0]]))
    binding.bind_output("y", "cuda", 0, out[0], out[1], held[-1].data_ptr())
    torch.cuda.synchronize()

    def run(number):
        run_graph(session, binding, number)

    facts = kernels(lambda: run("-1"), 8)
    run("1")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        start.record()
        for _ in range(200):
            run("1")
        end.record()
    torch.cuda.synchronize()
    return {
        "form": name,
        "kernels": facts["count"],
        "kernel_us": facts["us"],
        "replay_us": start.elapsed_time(end) * 5,
        "by": facts["top"],
    }


def capture_whole_runs():
    """Let the runtime capture all calls of a run as one graph, in the thread of the sessions.

    `enable_cuda_graph` is on, and ONNX Runtime captures no run (-1).
    """
    from sg_runtime.backends import ort as ours
    from sg_runtime.backends.trt import CapturedSequence

    class Outer(CapturedSequence):
        def __init__(self, calls, lane):
            super().__init__(calls, lane.memory)
            self._do = lane._backend.do

        def play(self, done):
            self._do(lambda: super(Outer, self).play(done))

    options = ours._run_options
    ours._run_options = lambda graph_id: options(None)
    ours.OrtLane.sequence = lambda self, calls: Outer(calls, self)


@check
def outer_capture(folder):
    """Capture ONNX Runtime's runs in a CUDA graph of the runtime. The process may abort."""

    from sg_runtime import Pipeline

    bundle = small(2, folder)
    wanted = Pipeline.load(bundle, "cpu").sample([0, 1], [5, 6], steps=8)
    capture_whole_runs()
    pipe = Pipeline.load(bundle, "cuda", backend="onnxruntime-cuda")
    return {"distances": [f"{rel(pipe.sample([0, 1], [5, 6], steps=8), wanted):.1e}" for _ in range(4)]}


def teardown(mode, bundle):
    """Capture, then drop the pipeline. Call it in a separate process.

    mode: "drop", "released", "outer" or "plain".
    """
    import gc

    import torch

    from sg_runtime import Pipeline

    wanted = Pipeline.load(bundle, "cpu").sample([0, 1], [5, 6], steps=8)
    if mode == "outer":
        capture_whole_runs()
    distances = []
    for _ in range(3):
        pipe = Pipeline.load(bundle, "cuda", backend="onnxruntime-cuda", capture=mode != "plain")
        for turn in range(4):
            distances.append(f"{rel(pipe.sample([0, 1], [5, 6], steps=8), wanted):.1e}")
            if turn == 2:  # a run between replays may reuse buffers that a graph still reads
                pipe.guided(pipe.initial_noise([1, 2]), pipe.prepare_once(0.5, [0, 1]))
        if mode == "released":
            pipe.release()
            torch.cuda.synchronize()
        del pipe
        gc.collect()
        time.sleep(0.3)
    print("distances", max(distances), flush=True)


@check
def teardown_in_a_process(mode, bundle):
    command = [sys.executable, "-m", "benchmarks.gpu_check", f"teardown-{mode}", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = done.stderr.replace("\n", " ")
    return {
        "mode": mode,
        "rc": done.returncode,
        "said": done.stdout.strip()[-100:],
        "error": said[said.find("terminate") :][-330:] if "terminate" in said else "",
    }


PARTS = {
    "driver": lambda folder: (
        machine(),
        dlpack_both_ways(),
        pageable_upload_may_be_overwritten(),
        floor_of_products_and_attention(),
        frees_and_allocations_during_captures(),
    ),
    "ort": lambda folder: (
        ort_loads(folder),
        ort_is_right(folder),
        ort_in_torchs_streams(folder),
        ort_threads(folder),
        ort_capture_disturbed(folder),
    ),
    "teardown": lambda folder: [
        teardown_in_a_process(mode, small(2, folder)) for mode in ("plain", "drop", "released", "outer")
    ],
    "micro": lambda folder: [micro_one(*one) for one in micro_models()],
    "build-xl": lambda folder: [xl_build(*setting) for setting in SETTINGS],
    "xl": lambda folder: [xl(*setting) for setting in SETTINGS],
    "eager": lambda folder: [xl_beside_torch(*setting, "pytorch") for setting in SETTINGS],
    "compiled": lambda folder: [xl_beside_torch(*setting, "pytorch-compiled") for setting in SETTINGS],
    "outer": lambda folder: outer_capture(folder),
}


def main():
    if len(sys.argv) == 3 and sys.argv[1].startswith("teardown-"):
        teardown(sys.argv[1].removeprefix("teardown-"), sys.argv[2])
        return
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown or len(sys.argv) == 1:
        raise SystemExit(f"expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown)) or 'none'}")
    with tempfile.TemporaryDirectory() as folder:
        for part in sys.argv[1:]:
            PARTS[part](folder)


if __name__ == "__main__":
    main()
