"""Ranges of activations: measured on feeds, kept in a table that is bound to the model."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from sg_calibration.feeds import Shard
from sg_calibration.layers import Layer, layers_of
from sg_calibration.settings import METHODS, Method
from sg_runtime.backends.ort import open_session
from sg_runtime.errors import CalibrationError, UsageError
from sg_runtime.files import replacing
from sg_runtime.manifest import GraphFacts, GuidancePlan, Manifest
from sg_runtime.pipeline import Pipeline
from sg_runtime.steps import StepRunner, launches

SCHEMA_VERSION = 1
PERCENTILE = 99.99
BINS = 2048
LEAST_VALUES = 10_000
"""Fewer values of a layer than this say little of its range."""


@dataclass(frozen=True, slots=True)
class LayerRange:
    """What was seen of a layer's input. largest: its magnitude in every stratum. thresholds: by method."""

    largest: tuple[float, ...]
    thresholds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RangeTable:
    """Ranges of all layers of a model. times: of the strata. evaluations: of images that were seen in all."""

    identity: str
    images: int
    evaluations: int
    times: tuple[float, ...]
    layers: Mapping[str, LayerRange] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def ranges(self, method: Method) -> dict[str, float]:
        """The largest magnitude that each layer's quantized input can have."""
        return {name: layer.thresholds[method] for name, layer in self.layers.items()}


def identity_of(manifest: Manifest) -> str:
    """What ranges depend on: the checkpoint, which of its weights, the route, and what the network predicts."""
    sources = [(s.sha256, s.weights) for s in (manifest.source, manifest.weak_source) if s is not None]
    facts = [sources, str(manifest.model.route), manifest.model.prediction, manifest.model.heads]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def measure(
    pipe: Pipeline,
    guidances: Sequence[GuidancePlan],
    shards: Iterable[Shard],
    report: Callable[[str], None] = lambda _: None,
) -> RangeTable:
    """Run every shard through the graphs of every guidance, and see what comes into each layer.

    pipe: over FP32 graphs on the CPU. Both branches and all sparsities add to one range, as their tokens share the
    tensors. Raises CalibrationError for an input that is not finite or always the same, and for too few values.
    """
    manifest = pipe.bundle.manifest
    collector = HistogramCollector("percentile", True, BINS, 128, PERCENTILE, "same")
    observers: dict[str, _Observer] = {}
    largest: dict[str, dict[float, float]] = {}
    ends: dict[str, tuple[float, float]] = {}
    counts: dict[str, int] = {}
    images = evaluations = 0
    runner = StepRunner(manifest, pipe.backend.lane(), pipe.batch, pipe.backend.batches)
    for number, shard in enumerate(shards):
        report(f"measuring ranges, shard {number + 1}")
        images += len(shard.label)
        for guidance in guidances:
            plan = pipe.prepare(
                shard.time,
                shard.classes(manifest.model),
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
                        seen = observers[launch.graph.name](runner.feeds(launch, x, x, index, group))
                        _check(seen)
                        with contextlib.redirect_stdout(None):  # it tells of every call
                            collector.collect({name: [value.ravel()] for name, value in seen.items()})
                        for name, value in seen.items():
                            at = largest.setdefault(name, {})
                            time = float(shard.time[index])
                            at[time] = max(at.get(time, 0.0), float(np.abs(value).max()))
                            low, high = ends.get(name, (np.inf, -np.inf))
                            ends[name] = min(low, float(value.min())), max(high, float(value.max()))
                            counts[name] = counts.get(name, 0) + value.size
    if not counts or min(counts.values()) < LEAST_VALUES:
        name = min(counts, key=lambda key: counts[key], default="every layer")
        raise CalibrationError(
            f"{name}: expected at least {LEAST_VALUES} values, found {counts.get(name, 0)}: give more --calib-samples"
        )
    with contextlib.redirect_stdout(None):
        thresholds = {"percentile": collector.compute_percentile(), "entropy": collector.compute_entropy()}
    layers = {}
    for name, at in largest.items():
        low, high = ends[name]
        if low == high:
            raise CalibrationError(
                f"{name}: expected inputs that change, found {low:g} alone: check the checkpoint, or give other "
                f"--calib-data"
            )
        found = {"min-max": max(at.values())}
        found |= {method: float(np.abs(values[name][:2]).max()) for method, values in thresholds.items()}
        layers[name] = LayerRange(tuple(at[time] for time in sorted(at, reverse=True)), found)
    times = tuple(sorted({time for at in largest.values() for time in at}, reverse=True))
    return RangeTable(identity_of(manifest), images, evaluations, times, layers)


class _Observer:
    """A graph that gives what comes into its layers."""

    def __init__(self, pipe: Pipeline, graph: GraphFacts) -> None:
        path = pipe.bundle.onnx(graph)
        model = onnx.load(path, load_external_data=False)
        self.layers: dict[str, Layer] = layers_of(model)
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
            raise CalibrationError(f"{name}: expected finite inputs, found NaN or infinity: check the model by verify")


def write_table(table: RangeTable, path: Path) -> None:
    """Write a table as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(table), indent=1) + "\n")


def read_table(path: Path, identity: str) -> RangeTable:
    """Read the table of ranges of the model `identity`.

    Raises CalibrationError for a file that is none, or of another model, and UsageError where there is no file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: expected a table of ranges, found no file: make it with sg-export calibrate")
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}")
        if not isinstance(content["identity"], str):
            raise ValueError(f"identity {content['identity']!r}")
        layers = {
            name: LayerRange(tuple(map(float, layer["largest"])), {m: float(layer["thresholds"][m]) for m in METHODS})
            for name, layer in content["layers"].items()
        }
        times = tuple(map(float, content["times"]))
        table = RangeTable(content["identity"], content["images"], content["evaluations"], times, layers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path}: expected a table of ranges, found something else ({error})") from None
    if table.identity != identity:
        raise CalibrationError(
            f"{path}: expected the ranges of this model, {identity[:12]}…, found those of another, "
            f"{table.identity[:12]}…: make it anew with sg-export calibrate"
        )
    for name, layer in table.layers.items():
        if not all(0 < value < float("inf") for value in layer.thresholds.values()):
            raise CalibrationError(f"{path}: {name}: expected positive ranges, found {dict(layer.thresholds)}")
    return table
