"""Ranges of activations compared with the values of a session, and the table that stores them."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from onnxruntime.quantization.calibrate import HistogramCollector

from sg_calibration import ranges
from sg_calibration.feeds import Shard, given_shards, identity_of, read_shard
from sg_calibration.layers import layers_of
from sg_calibration.ranges import RangeTable, Runs, measure, read_table, write_table
from sg_export.models.dit import ENDS
from sg_export.quantize.rewrite import reference_pipeline
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CalibrationError, UsageError
from sg_runtime.guidance import built_guidances
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.kept import restore, rows


@pytest.fixture
def table(tiny_ranges: Path, reference: Bundle) -> RangeTable:
    return read_table(tiny_ranges, identity_of(reference.manifest))


@pytest.fixture
def shards(tiny_ranges: Path, reference: Bundle) -> list[Shard]:
    return [read_shard(path, reference.manifest.model) for path in given_shards(tiny_ranges.parent / "feeds")]


def seen_by_hand(pipe: Pipeline, pair: int, shards: list[Shard]) -> dict[str, dict[float, float]]:
    """Return the largest magnitude of every layer's input in a pair's guided graph, by time."""
    plan = built_guidances(pipe.bundle.manifest)[pair]
    graph = pipe.bundle.manifest.graph("guided", plan.strong.keep, plan.weak.keep)
    assert graph is not None
    model = onnx.load(pipe.bundle.onnx(graph))
    sources = {layer.source: name for name, layer in layers_of(model, ENDS).items()}
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in sources)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, dict[float, float]] = {name: {} for name in sources.values()}
    for shard in shards:
        images = (shard.conditions, shard.seed.tolist())
        prepared = pipe.prepare(shard.time, *images, counters=shard.counters, guidance=plan)
        assert prepared.weak is not None
        held = prepared.strong.held["modulations"]
        for k, x in enumerate(shard.x):
            feeds: dict[str, Any] = dict.fromkeys(("scale", "c_in", "c_skip", "c_out", "a", "b", "e"), np.float32(1))
            feeds |= {"x": x, "r": x, "modulations": held.values[k][held.rows]}
            for end, branch in (("strong", prepared.strong), ("weak", prepared.weak)):
                if (keep := branch.keep[k]) is not None:
                    model_facts = pipe.bundle.manifest.model
                    feeds[f"rows_{end}"] = rows(keep, model_facts.tokens)
                    feeds[f"restore_{end}"] = restore(keep, model_facts.tokens, model_facts.masked)
            wanted = [tensor.name for tensor in graph.inputs]
            values = session.run(list(sources), {name: np.asarray(feeds[name]) for name in wanted})
            for name, value in zip(sources.values(), values, strict=True):
                time = float(shard.time[k])
                found[name][time] = max(found[name].get(time, 0.0), float(np.abs(value).max()))
    return found


def test_measure_has_the_largest_of_both_branches_and_all_pairs(
    table: RangeTable, pipe: Pipeline, shards: list[Shard]
) -> None:
    pairs = [seen_by_hand(pipe, pair, shards) for pair in (0, 1)]
    assert table.layers.keys() == pairs[0].keys()
    for name, layer in table.layers.items():
        wanted = [max(pair[name][time] for pair in pairs) for time in table.times]
        # A graph optimized for other outputs sums float32 in another order.
        np.testing.assert_allclose(layer.largest, wanted, rtol=1e-5, err_msg=name)
        assert layer.thresholds["min-max"] == max(layer.largest)
    for pair in pairs:  # neither pair alone has all maxima
        short = [
            pair[name][time] < 0.999 * largest
            for name, layer in table.layers.items()
            for time, largest in zip(table.times, layer.largest, strict=True)
        ]
        assert any(short)


def test_measure_tells_how_much_it_has_seen(table: RangeTable, shards: list[Shard]) -> None:
    """Each of the two pairs made two images, and every pair runs all of them."""
    assert table.images == 4
    assert table.evaluations == 2 * sum(len(shard.time) * len(shard.seed) for shard in shards)
    assert len(table.times) == 25
    assert list(table.times) == sorted(table.times, reverse=True)


def test_measure_gives_thresholds_within_what_was_seen(table: RangeTable) -> None:
    for name, layer in table.layers.items():
        found = layer.thresholds
        assert 0 < found["percentile"] <= found["min-max"], name
        assert 0 < found["entropy"] <= found["min-max"], name
    assert any(layer.thresholds["percentile"] < layer.thresholds["min-max"] for layer in table.layers.values())
    assert table.ranges("min-max") == {name: layer.thresholds["min-max"] for name, layer in table.layers.items()}


def batches_of(data: st.DataObject) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Draw batches of values whose magnitudes may differ greatly between batches."""
    scales = data.draw(st.lists(st.sampled_from([0.0, 1e-6, 0.01, 1.0, 300.0, 1e5]), min_size=1, max_size=5))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    return [(generator.standard_normal(2000) * scale).astype(np.float32) for scale in scales]


@given(st.data())
def test_histogram_percentile_is_near_that_of_all_values_whatever_came_first(data: st.DataObject) -> None:
    batches = batches_of(data)
    histogram = ranges._Histogram()
    for batch in batches:
        histogram.add(batch)
    magnitudes = np.abs(np.concatenate(batches))
    assert histogram.counts.sum() == magnitudes.size
    assert len(histogram.counts) == ranges.BINS
    exact = float(np.quantile(magnitudes, ranges.PERCENTILE / 100, method="inverted_cdf"))
    width = max(2 * float(magnitudes.max()), 1e-20) / ranges.BINS
    assert exact * (1 - 1e-6) <= histogram.percentile() <= exact + width * (1 + 1e-6)


def test_histogram_entropy_is_that_of_onnx_runtime() -> None:
    """If all values come in one batch, ONNX Runtime's collector has the same bins."""
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[:5] = [18, -17, 16, 15, -14]
    histogram = ranges._Histogram()
    histogram.add(values)
    collector = HistogramCollector(
        "entropy", True, 2 * ranges.ENTROPY_BINS, ranges.QUANTIZED_BINS, ranges.PERCENTILE, "same"
    )
    with contextlib.redirect_stdout(None):
        collector.collect({"values": [values]})
        low, high = collector.compute_entropy()["values"][:2]
    bin_width = 18 / ranges.ENTROPY_BINS
    assert histogram.entropy() == pytest.approx(max(abs(low), abs(high)), abs=2 * bin_width)
    assert histogram.entropy() < 9, "outliers are cut off"


def test_measure_of_too_few_values_is_refused(pipe: Pipeline, shards: list[Shard]) -> None:
    one = shards[0]
    cut = Shard(
        one.x[:1, :1], one.time[:1], one.step[:1], one.evaluation[:1], one.seed[:1], one.conditions.of(np.array([0]))
    )
    plans = built_guidances(pipe.bundle.manifest)
    for few in ([cut], []):
        with pytest.raises(CalibrationError, match=r"expected at least 10000 values, found \d+: give more `samp"):
            measure([Runs(pipe, plans, few)])


def test_measure_of_too_few_times_is_refused(pipe: Pipeline, shards: list[Shard]) -> None:
    few = [replace(shard, x=shard.x[:9], time=shard.time[:9]) for shard in shards]
    few = [replace(shard, step=shard.step[:9], evaluation=shard.evaluation[:9]) for shard in few]
    with pytest.raises(CalibrationError, match=r"expected at least 25 different times along a run, found \d:"):
        measure([Runs(pipe, built_guidances(pipe.bundle.manifest), few)])


@pytest.fixture
def altered(reference: Bundle, tmp_path: Path) -> Callable[..., Pipeline]:
    """Return a function that fills initializers of the tiny model's FP32 graphs, by name."""

    def alter(**values: float) -> Pipeline:
        (tmp_path / "graphs").mkdir()
        for file in (reference.path / "graphs").iterdir():
            if file.suffix != ".onnx":
                continue
            model = onnx.load(file)
            for tensor in model.graph.initializer:
                for name, value in values.items():
                    if tensor.name.startswith(name.replace("__", ".")):
                        filled = np.full_like(numpy_helper.to_array(tensor), value)
                        tensor.CopyFrom(numpy_helper.from_array(filled, tensor.name))
            onnx.save(model, tmp_path / "graphs" / file.name)
        return reference_pipeline(Bundle(tmp_path, reference.manifest))

    return alter


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_measure_of_inputs_that_are_not_finite_names_the_layer(
    value: float, altered: Callable[..., Pipeline], shards: list[Shard]
) -> None:
    pipe = altered(blocks__0__mlp__fc1__bias=value)
    with pytest.raises(CalibrationError, match=r"blocks.0.mlp.fc2: expected finite inputs, found NaN or infinity"):
        measure([Runs(pipe, built_guidances(pipe.bundle.manifest), shards)])


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_measure_of_inputs_that_never_change_names_the_layer(
    value: float, altered: Callable[..., Pipeline], shards: list[Shard]
) -> None:
    pipe = altered(blocks__1__mlp__fc1__weight=0.0, blocks__1__mlp__fc1__bias=value)
    with pytest.raises(CalibrationError, match=r"blocks.1.mlp.fc2: expected inputs that change, found only [\d.]+: ch"):
        measure([Runs(pipe, built_guidances(pipe.bundle.manifest), shards[:1])])


def test_identity_of_is_that_of_the_checkpoint_and_not_of_the_bundle(
    reference: Bundle, tiny_edm_bundle: Path, tiny_autoguidance_bundle: Path
) -> None:
    manifest = reference.manifest
    assert identity_of(replace(manifest, graphs=manifest.graphs[:1], batch=3)) == identity_of(manifest)
    others = [Bundle.open(path).manifest for path in (tiny_edm_bundle, tiny_autoguidance_bundle)]
    others.append(replace(manifest, source=replace(manifest.source, weights="ema")))
    others.append(replace(manifest, model=replace(manifest.model, route=None)))
    assert len({identity_of(other) for other in (manifest, *others)}) == 5


def test_write_table_and_read_table_round_trip(table: RangeTable, tmp_path: Path) -> None:
    write_table(table, tmp_path / "table.json")
    assert read_table(tmp_path / "table.json", table.identity) == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_read_table_of_another_model_says_what_to_do(tiny_ranges: Path) -> None:
    with pytest.raises(CalibrationError, match=r"found ranges of model .*: make a table of this model with"):
        read_table(tiny_ranges, "0" * 64)


def test_read_table_without_a_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found no file: make it with sg-export calibrate") as caught:
        read_table(tmp_path / "missing.json", "0")
    assert caught.value.exit_code == 2


def edited(path: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    out.write_text(json.dumps(content))
    return out


QKV = "blocks.0.attn.qkv"


@pytest.mark.parametrize(
    "edit",
    [
        lambda table: table.update(schema_version=2),
        lambda table: table.pop("layers"),
        lambda table: table.pop("times"),
        lambda table: table.update(layers=[]),
        lambda table: table.update(identity=None),
        lambda table: table["layers"][QKV].pop("thresholds"),
        lambda table: table["layers"][QKV]["thresholds"].pop("entropy"),
        lambda table: table["layers"][QKV]["thresholds"].update(entropy="wide"),
        lambda table: table.update(images="16"),
        lambda table: table.update(more=1),
    ],
    ids=[
        "version",
        "no layers",
        "no times",
        "a list",
        "no identity",
        "no thresholds",
        "no method",
        "a word",
        "a number as text",
        "a key more",
    ],
)
def test_read_table_that_is_damaged_is_refused(
    edit: Callable[[dict[str, Any]], object], tiny_ranges: Path, table: RangeTable, tmp_path: Path
) -> None:
    path = edited(tiny_ranges, tmp_path / "table.json", edit)
    message = r"expected (a table of ranges, found something else|schema version 1, found 2|ranges by min-max)"
    with pytest.raises(CalibrationError, match=message):
        read_table(path, table.identity)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"schema_version": 1'])
def test_read_table_of_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(content)
    with pytest.raises(CalibrationError, match="expected a table of ranges, found something else"):
        read_table(tmp_path / "table.json", "0")


def test_read_table_skips_a_byte_order_mark(tiny_ranges: Path, table: RangeTable, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(b"\xef\xbb\xbf" + tiny_ranges.read_bytes())
    assert read_table(tmp_path / "table.json", table.identity) == table


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_read_table_with_a_threshold_that_is_none_names_the_layer(
    value: float, tiny_ranges: Path, table: RangeTable, tmp_path: Path
) -> None:
    path = edited(
        tiny_ranges, tmp_path / "table.json", lambda t: t["layers"][QKV]["thresholds"].update(percentile=value)
    )
    with pytest.raises(CalibrationError, match=rf"{QKV}: expected positive ranges"):
        read_table(path, table.identity)
