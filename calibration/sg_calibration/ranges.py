"""Ranges of activations: measured on calibration data, stored in a table bound to the model."""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector
from pydantic import TypeAdapter, ValidationError

from sg_calibration.feeds import Shard, identity_of
from sg_calibration.layers import Layer, layers_of
from sg_calibration.settings import LEAST_STRATA, METHODS, Method
from sg_runtime.backends.ort import open_session
from sg_runtime.errors import CalibrationError, UsageError
from sg_runtime.files import replacing
from sg_runtime.manifest import GraphFacts, GuidancePlan, size_text
from sg_runtime.manifest.base import Strict
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.launches import launches

SCHEMA_VERSION = 1
"""Version of the table's JSON file."""
PERCENTILE = 99.99
BINS = 1 << 16
"""Bins of a histogram of magnitudes."""
ENTROPY_BINS = 512
"""Bins of the entropy method, whose time is quadratic in their number."""
QUANTIZED_BINS = 128
LEAST_VALUES = 10_000
"""Least number of values of a layer from which its range is determined."""


@dataclass(frozen=True, slots=True)
class LayerRange(Strict):
    """Measured range of a layer's input.

    largest: largest magnitude at each time of the table. thresholds: range by method.
    """

    largest: tuple[float, ...]
    thresholds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RangeTable(Strict):
    """Ranges of all layers of a model.

    identity: identity of the model, see `identity_of`.
    images: number of images of the calibration data.
    evaluations: number of evaluations measured: images × guidances × evaluations of a run.
    times: times (t or sigma) of the strata, from noise to image.
    layers: measured range of each layer by its name.
    schema_version: version of the JSON file.
    """

    identity: str
    images: int
    evaluations: int
    times: tuple[float, ...]
    layers: Mapping[str, LayerRange]
    schema_version: int = SCHEMA_VERSION

    def ranges(self, method: Method) -> dict[str, float]:
        """Return each layer's range by `method`: the largest magnitude of its quantized input."""
        return {name: layer.thresholds[method] for name, layer in self.layers.items()}


@dataclass(frozen=True, slots=True)
class Runs:
    """Shards of one size of the samples, and what they run through.

    pipe: pipeline with FP32 graphs on the CPU.
    guidances: guidances of which the pipeline has graphs.
    shards: shards of the pipeline's size.
    """

    pipe: Pipeline
    guidances: Sequence[GuidancePlan]
    shards: Iterable[Shard]


def measure(runs: Sequence[Runs], report: Callable[[str], None] = lambda _: None) -> RangeTable:
    """Measure the inputs of all layers while every shard runs through the graphs of every guidance.

    runs: those of each size of one model. Each layer has one range for all sizes, both branches and
    all sparsities, as their tokens share tensors. Raises CalibrationError if an input is not finite
    or is constant, or if there are too few values or times.
    """
    histograms: dict[str, _Histogram] = {}
    largest: dict[str, dict[float, float]] = {}
    images = evaluations = 0
    for size in runs:
        observers: dict[str, _Observer] = {}
        pipe, manifest = size.pipe, size.pipe.bundle.manifest
        runner = GraphRunner(manifest, pipe.backend.lane(), pipe.batch, pipe.backend.batches)
        for number, shard in enumerate(size.shards):
            report(f"measuring ranges at {size_text(manifest.model.size)}, shard {number + 1}")
            images += len(shard.seed)
            for guidance in size.guidances:
                plan = pipe.prepare(
                    shard.time,
                    shard.conditions,
                    shard.seed.tolist(),
                    counters=shard.counters,
                    guidance=guidance,
                )
                for index, x in enumerate(shard.x):
                    evaluations += len(x)
                    for launch in launches(manifest, plan, index, 0.0, 1.0, 0.0):
                        if launch.graph.name not in observers:
                            observers[launch.graph.name] = _Observer(pipe, launch.graph)
                        for group in runner.groups(len(x)):
                            seen = observers[launch.graph.name](runner.feeds(plan, launch, x, x, group))
                            _check(seen)
                            for name, value in seen.items():
                                highest = histograms.setdefault(name, _Histogram()).add(value)
                                at = largest.setdefault(name, {})
                                time = float(shard.time[index])
                                at[time] = max(at.get(time, 0.0), highest)
    counts = {name: int(histogram.counts.sum()) for name, histogram in histograms.items()}
    if not counts or min(counts.values()) < LEAST_VALUES:
        name = min(counts, key=lambda key: counts[key], default="every layer")
        raise CalibrationError(
            f"{name}: expected at least {LEAST_VALUES} values, found {counts.get(name, 0)}: give more `samples`"
        )
    times = tuple(sorted({time for at in largest.values() for time in at}, reverse=True))
    if len(times) < LEAST_STRATA:
        raise CalibrationError(
            f"calibration data: expected at least {LEAST_STRATA} different times along a run, found {len(times)}: "
            f"activations change along a run, so give states from the entire run"
        )
    layers = {}
    for name, at in largest.items():
        seen_of = histograms[name]
        if seen_of.low == seen_of.high:
            raise CalibrationError(
                f"{name}: expected inputs that change, found only {seen_of.low:g}: check the checkpoint, or give "
                f"other `data`"
            )
        largest_of_all = max(at.values())
        found = {"min-max": largest_of_all, "percentile": seen_of.percentile(), "entropy": seen_of.entropy()}
        found = {method: min(value, largest_of_all) for method, value in found.items()}
        layers[name] = LayerRange(tuple(at[time] for time in sorted(at, reverse=True)), found)
    return RangeTable(identity_of(runs[0].pipe.bundle.manifest), images, evaluations, times, layers)


class _Histogram:
    """A histogram of magnitudes in equal bins from 0, with the lowest and the highest value.

    If a value lies beyond the bins, their width doubles. (ONNX Runtime's collector keeps the width
    that it chose for the first batch, so a later outlier adds an unbounded number of bins.)
    """

    def __init__(self) -> None:
        self.top = 1e-20
        self.counts = np.zeros(BINS, np.int64)
        self.low, self.high = np.inf, -np.inf

    def add(self, values: NDArray[np.float32]) -> float:
        """Count these values and return the largest magnitude among them."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        magnitudes = np.abs(values).ravel()
        highest = float(magnitudes.max(initial=0.0))
        if not self.counts.any():
            self.top = max(self.top, highest)
        while highest > self.top:
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), (0, BINS // 2))
            self.top *= 2
        places = (magnitudes * (BINS / self.top)).astype(np.int64)
        self.counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)
        return highest

    def percentile(self) -> float:
        """Return the PERCENTILE-th percentile of the magnitudes, rounded up to a bin's edge."""
        reached = np.cumsum(self.counts)
        return float((np.searchsorted(reached, PERCENTILE / 100 * reached[-1]) + 1) * self.top / BINS)

    def entropy(self) -> float:
        """Return the threshold at which eight bits lose the least information.

        ONNX Runtime's entropy calibration finds it.
        """
        half = self.counts.reshape(ENTROPY_BINS, -1).sum(1)
        edges = np.linspace(-self.top, self.top, 2 * ENTROPY_BINS + 1)
        collector = HistogramCollector("entropy", True, 2 * ENTROPY_BINS, QUANTIZED_BINS, PERCENTILE, "same")
        both = (np.concatenate([half[::-1], half]), edges, -self.top, self.top, self.top)
        return float(np.abs(collector.get_entropy_threshold(both, QUANTIZED_BINS)[:2]).max())


class _Observer:
    """A session over a graph whose outputs are the inputs of its quantizable layers."""

    def __init__(self, pipe: Pipeline, graph: GraphFacts) -> None:
        path = pipe.bundle.onnx(graph)
        model = onnx.load(path, load_external_data=False)
        self.layers: dict[str, Layer] = layers_of(model, pipe.bundle.manifest.model.ends)
        types = {value.name: value for value in model.graph.value_info}
        del model.graph.output[:]
        model.graph.output.extend(types[layer.source] for layer in self.layers.values())
        self.session = open_session(path, model.SerializeToString())

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        found = self.session.run([layer.source for layer in self.layers.values()], dict(feeds))
        return dict(zip(self.layers, found, strict=True))


def _check(seen: Mapping[str, NDArray[np.float32]]) -> None:
    for name, value in seen.items():
        if not np.isfinite(value).all():
            raise CalibrationError(f"{name}: expected finite inputs, found NaN or infinity: run sg-export verify")


def write_table(table: RangeTable, path: Path) -> None:
    """Write a table to `path` as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(table), indent=1) + "\n")


def read_table(path: Path, identity: str) -> RangeTable:
    """Read the table of ranges of the model with this identity.

    Raises UsageError if there is no file. Raises CalibrationError if the file is not a table, or if
    it is the table of another model.
    """
    if not path.is_file():
        raise UsageError(f"{path}: expected a table of ranges, found no file: make it with sg-export calibrate")
    try:
        table = TypeAdapter(RangeTable).validate_json(path.read_bytes().removeprefix(BOM_UTF8))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "entire file"
        raise CalibrationError(
            f"{path}: expected a table of ranges, found something else ({where}: {first['msg']})"
        ) from None
    if table.schema_version != SCHEMA_VERSION:
        raise CalibrationError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {table.schema_version}: make it again with "
            f"sg-export calibrate"
        )
    if table.identity != identity:
        raise CalibrationError(
            f"{path}: expected ranges of this model, {identity[:12]}…, found ranges of model "
            f"{table.identity[:12]}…: make a table of this model with sg-export calibrate"
        )
    for name, layer in table.layers.items():
        if layer.thresholds.keys() != set(METHODS):
            raise CalibrationError(
                f"{path}: {name}: expected ranges by {', '.join(METHODS)}, found {', '.join(layer.thresholds)}"
            )
        if not all(0 < value < float("inf") for value in layer.thresholds.values()):
            raise CalibrationError(f"{path}: {name}: expected positive ranges, found {dict(layer.thresholds)}")
    return table
