r"""Compare one guided step of our guided graph with the alternatives to it.

    python -m benchmarks.guided_step --model S/2 B/2 --output benchmarks/results/guided_step.json
    python -m benchmarks.guided_step --model XL/2 --batch 1 --sides ours eager onnx --rounds 5 \
        --output …

If the output file exists and is from the same machine and libraries, its rows of other models are
kept.

All sides of a setting are timed in turn in every round, in one process with the same threads. A
ratio is the median of the rounds' ratios to our time, with quartiles. The weights are random, in
FP32. The route is 2-9 for S/2 and B/2, 2-20 for L/2 and 2-24 for XL/2. Each image has one class.
Each side computes one step, from one latent to the next:

ours      the guided graph, and its share of `condition`: one row per image
separate  our dense or sparse step graphs, one run per branch, and the same share of `condition`
onnx      one ONNX graph per branch with inputs (x, t, class, keep), exported and optimized by
          PyTorch; update in NumPy
eager     PyTorch, two passes of the model
compiled  the same under torch.compile
cfg       classifier-free guidance with our dense step graph at twice the batch, and its share of
          `condition`
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.export_size import SHAPES, write_checkpoint
from benchmarks.machine import machine
from sg_export import CompileOptions, LoadedModel, Overrides, compile, load_model
from sg_export.models.dit import DiTConfig
from sg_runtime import philox
from sg_runtime.bundle import Bundle
from sg_runtime.guidance import guide
from sg_runtime.manifest import GraphFacts, Manifest, Route
from sg_runtime.run.kept import restore, rows

Array = NDArray[Any]
Side = Callable[[], object]
SIDES = ("ours", "separate", "onnx", "eager", "compiled", "cfg")
PAIRS = {"0/0.5": (0.0, 0.5), "0.5/0.9": (0.5, 0.9)}
ROUTES = {"S/2": Route(2, 9), "B/2": Route(2, 9), "L/2": Route(2, 20), "XL/2": Route(2, 24)}
SCALE, STEP, TIME = 2.0, -1 / 40, 0.6
PAUSE = 0.05
"""Seconds to wait before a side is timed, because threads of the previous side still spin."""


@dataclass(frozen=True, slots=True)
class Row:
    """Time of one side in one setting.

    model: size of the model.
    pair: sparsities of the strong and the weak branch.
    batch: number of images.
    side: name of the side.
    rounds: number of timed rounds.
    median_ms: median time over the rounds, in milliseconds.
    quartiles_ms: lower and upper quartile of that time.
    ratio: median ratio of this time to ours.
    ratio_quartiles: lower and upper quartile of that ratio.
    """

    model: str
    pair: str
    batch: int
    side: str
    rounds: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """A bundle, its PyTorch model, and the inputs of one step.

    bundle: bundle of the pair of sparsities.
    loaded: PyTorch model with the same weights.
    strong: sparsity of the strong branch.
    weak: sparsity of the weak branch.
    x: latents, (B, C, H, W).
    classes: classes, (B,).
    threads: number of threads of every session.
    folder: folder for files of a side.
    """

    bundle: Bundle
    loaded: LoadedModel
    strong: float
    weak: float
    x: NDArray[np.float32]
    classes: NDArray[np.int64]
    threads: int
    folder: Path

    @property
    def keeps(self) -> list[NDArray[np.int64] | None]:
        """Kept tokens of every image in the strong and in the weak branch; None if all are kept."""
        tokens = self.loaded.facts.tokens
        counts = [self.loaded.level(rate).keep for rate in (self.strong, self.weak)]

        def drawn(keep: int, branch: int) -> NDArray[np.int64]:
            rows = [
                philox.subset(seed, tokens, keep, step=0, evaluation=0, branch=branch) for seed in range(len(self.x))
            ]
            return np.stack(rows)

        return [None if keep == tokens else drawn(keep, branch) for branch, keep in enumerate(counts)]

    def session(self, path: Path) -> ort.InferenceSession:
        """Open a session with this setting's number of threads."""
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=["S/2"])
    parser.add_argument("--pair", choices=PAIRS, nargs="+", default=list(PAIRS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.model:
            loaded, bundles = prepare(name, [PAIRS[pair] for pair in options.pair], Path(scratch))
            for (strong, weak), bundle in bundles.items():
                for batch in options.batch:
                    generator, shape = np.random.default_rng(0), loaded.facts
                    latent = (batch, *shape.latent)
                    x = generator.standard_normal(latent, dtype=np.float32)
                    classes = generator.integers(0, shape.labels.count, batch)
                    setting = Setting(bundle, loaded, strong, weak, x, classes, options.threads, Path(scratch))
                    rows += measure(name, setting, options.sides, options.rounds)
    for row in rows:
        print(f"{row.model:5} {row.pair:8} B={row.batch} {row.side:9} {row.median_ms:9.1f} ms  {row.ratio:5.2f}")
    if options.output:
        facts = machine("numpy", "torch", "onnxruntime") | {
            "threads": options.threads,
            "precision": "fp32",
        }
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        kept = known["rows"] if known.get("machine") == facts else []
        kept = [row for row in kept if row["model"] not in options.model]
        options.output.write_text(
            json.dumps({"machine": facts, "rows": kept + [asdict(r) for r in rows]}, indent=1) + "\n"
        )


def prepare(
    name: str, pairs: Sequence[tuple[float, float]], folder: Path
) -> tuple[LoadedModel, dict[tuple[float, float], Bundle]]:
    """Return a model of the named size with random weights, and a bundle for every pair."""
    checkpoint, overrides = random_checkpoint(name, folder)
    bundles = {}
    for strong, weak in pairs:
        built = CompileOptions(folder / f"{strong:g}-{weak:g}", (weak,), (strong,), overrides=overrides, force=True)
        bundles[strong, weak] = compile(checkpoint, built)
    return load_model(checkpoint, overrides=overrides), bundles


def random_checkpoint(name: str, folder: Path) -> tuple[Path, Overrides]:
    """Write a checkpoint of the named size with random weights to `folder`.

    Returns its path and the overrides for facts that the checkpoint does not state.
    """
    width, depth, heads = SHAPES[name]
    checkpoint = folder / "random.pt"
    write_checkpoint(DiTConfig(32, 2, 4, width, depth, heads, 4 * width, 1000), checkpoint)
    return checkpoint, Overrides(route=ROUTES[name], prediction="flow")


def measure(name: str, setting: Setting, wanted: list[str], rounds: int) -> list[Row]:
    """Time the sides in turn. The first round is a warm-up and is not counted."""
    makers = {"ours": ours, "separate": separate, "onnx": onnx, "eager": eager, "compiled": compiled, "cfg": cfg}
    sides: dict[str, Side] = {}
    for side in wanted:
        if side != "cfg" or setting.strong == 0:
            sides[side] = makers[side](setting)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, run in sides.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            run()
            times[side].append((time.perf_counter() - began) * 1e3)
    share = condition_share(setting, rounds)
    extra = {"ours": share, "separate": share, "cfg": 2 * share}
    final = {side: [t + extra.get(side, 0.0) for t in series[1:]] for side, series in times.items()}
    pair, batch = f"{setting.strong:g}/{setting.weak:g}", len(setting.x)
    rows = []
    for side, series in final.items():
        ratios = [theirs / own for theirs, own in zip(series, final["ours"], strict=True)]
        rows.append(Row(name, pair, batch, side, rounds, *_median(series), *_median(ratios)))
    return rows


def _median(values: list[float]) -> tuple[float, tuple[float, float]]:
    low, middle, high = statistics.quantiles(values, n=4)
    return round(middle, 3), (round(low, 3), round(high, 3))


def condition_share(setting: Setting, rounds: int) -> float:
    """Measure the milliseconds of `condition` for one row per image.

    A run computes `condition` in full blocks of rows, so a full block is timed and divided by its
    number of rows.
    """
    manifest = setting.bundle.manifest
    rows = manifest.hoisted_rows["condition"]
    session = setting.session(setting.bundle.onnx(manifest.hoisted("main")[0]))
    feeds = {"t": np.linspace(0, 1, rows, dtype=np.float32), "class": np.zeros(rows, np.int64)}
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:]) / rows * len(setting.x)


def modulations(setting: Setting, classes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the modulations that `condition` computes for these classes."""
    with torch.no_grad():
        given = {"t": torch.full((len(classes),), TIME), "class": torch.from_numpy(classes)}
        (rows,) = setting.loaded.model.hoist("condition", given)
    found: NDArray[np.float32] = rows.numpy()
    return found


def graph_of(manifest: Manifest, loaded: LoadedModel, rate: float) -> GraphFacts:
    """Return our step graph of one branch."""
    keep = loaded.level(rate).keep
    found = manifest.graph("dense" if rate == 0 else "sparse", keep)
    assert found is not None
    return found


def tail(x: Array, b: float, r: Array, e: float = 0.0, a: float = 1.0) -> dict[str, Array]:
    """Return the inputs that every step graph has."""
    scalars = {"c_in": 1.0, "c_skip": 0.0, "c_out": 1.0, "a": a, "b": b, "e": e}
    return {name: np.array(value, np.float32) for name, value in scalars.items()} | {"x": x, "r": r}


def subset(setting: Setting, keep: NDArray[np.int64] | None, end: str = "") -> dict[str, Array]:
    """Return the inputs that hold a branch's kept tokens; `end` is that of their names."""
    if keep is None:
        return {}
    facts = setting.loaded.facts
    return {f"rows{end}": rows(keep, facts.tokens), f"restore{end}": restore(keep, facts.tokens, facts.masked)}


def ours(setting: Setting) -> Side:
    """Return a run of the guided graph."""
    manifest = setting.bundle.manifest
    keeps = [setting.loaded.level(rate).keep for rate in (setting.strong, setting.weak)]
    graph = manifest.graph("guided", *keeps)
    assert graph is not None
    session = setting.session(setting.bundle.onnx(graph))
    strong, weak = setting.keeps
    feeds = tail(setting.x, STEP, setting.x) | subset(setting, strong, "_strong") | subset(setting, weak, "_weak")
    feeds |= {"modulations": modulations(setting, setting.classes), "scale": np.array(SCALE, np.float32)}
    return lambda: session.run(["next"], feeds)


def separate(setting: Setting) -> Side:
    """Return a run of our two step graphs, one per branch. Each computes its part of the update."""
    manifest, given = setting.bundle.manifest, {"modulations": modulations(setting, setting.classes)}
    runs = []
    for rate, keep in zip((setting.strong, setting.weak), setting.keeps, strict=True):
        session = setting.session(setting.bundle.onnx(graph_of(manifest, setting.loaded, rate)))
        runs.append((session, given | subset(setting, keep)))
    (strong, strong_feeds), (weak, weak_feeds) = runs

    def run() -> object:
        part = strong.run(["next"], strong_feeds | tail(setting.x, STEP * SCALE, setting.x))[0]
        return weak.run(["next"], weak_feeds | tail(setting.x, STEP * (1 - SCALE), part, e=1.0, a=0.0))

    return run


def onnx(setting: Setting) -> Side:
    """Return a run of one graph per branch with time and class as inputs.

    PyTorch's exporter makes the graphs, with its own optimizations.
    """
    t = np.full(len(setting.x), TIME, np.float32)
    runs = []
    for keep in setting.keeps:
        feeds: dict[str, Array] = {"x": setting.x, "t": t, "classes": setting.classes}
        feeds |= {} if keep is None else {"keep": keep}
        path = setting.folder / f"plain-{len(setting.x)}-{'all' if keep is None else keep.shape[1]}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                setting.loaded.model,
                kwargs={name: torch.from_numpy(value) for name, value in feeds.items()},
                verbose=False,
                dynamo=True,
            )
        assert program is not None
        program.save(path, external_data=True)
        runs.append((setting.session(path), feeds))

    def run() -> object:
        strong, weak = (session.run(None, feeds)[0] for session, feeds in runs)
        return setting.x + np.float32(STEP) * guide(strong, weak, SCALE)

    return run


def two_passes(setting: Setting, model: Callable[..., Tensor]) -> Side:
    """Return a run of two PyTorch passes and the update."""
    x, classes = torch.from_numpy(setting.x), torch.from_numpy(setting.classes)
    t = torch.full((len(x),), TIME)
    keeps = [None if keep is None else torch.from_numpy(keep) for keep in setting.keeps]

    def run() -> object:
        with torch.no_grad():
            strong, weak = (model(x, t, classes, keep) for keep in keeps)
            return x + STEP * (weak + SCALE * (strong - weak))

    return run


def eager(setting: Setting) -> Side:
    """Return a run of PyTorch in eager mode."""
    return two_passes(setting, setting.loaded.model)


def compiled(setting: Setting) -> Side:
    """Return a run of PyTorch under torch.compile.

    The model is compiled again for every shape before it is timed. It is also compiled again for
    every setting, because PyTorch runs a function uncompiled from its ninth shape on.
    """
    torch.compiler.reset()
    return two_passes(setting, torch.compile(setting.loaded.model, dynamic=False))


def cfg(setting: Setting) -> Side:
    """Return a run of classifier-free guidance in the usual form.

    One dense graph runs the conditional and the unconditional half in one batch.
    """
    manifest, count = setting.bundle.manifest, len(setting.x)
    session = setting.session(setting.bundle.onnx(graph_of(manifest, setting.loaded, 0.0)))
    classes = np.concatenate([setting.classes, np.full(count, setting.loaded.facts.labels.count)])
    rows = modulations(setting, classes)

    def run() -> object:
        x = np.concatenate([setting.x, setting.x])
        prediction = session.run(["prediction"], tail(x, 0.0, x) | {"modulations": rows})[0]
        return setting.x + np.float32(STEP) * guide(prediction[:count], prediction[count:], SCALE)

    return run


if __name__ == "__main__":
    main()
