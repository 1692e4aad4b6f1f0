"""Quantized bundles: their content, the layers that stay in FP32 or FP16, and failing gates."""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from sg_calibration.feeds import images_of
from sg_calibration.settings import FeedSettings
from sg_calibration.types import QUANTS
from sg_export.compiler import compile
from sg_export.graph.check import check_types
from sg_export.models.dit import ENDS
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_export.options.quantize import QuantizeOptions
from sg_export.options.types import BASES
from sg_export.quantize import search as quantization
from sg_export.quantize.search import _least, decide_quantization
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Conditions
from sg_runtime.errors import CalibrationError, ExportError, GateError, UsageError
from sg_runtime.manifest import QualityGates
from sg_runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow

Quantize = Callable[..., QuantizeOptions]
STEP = [f"blocks.{k}.{name}" for k in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
CONDITION = [*(f"blocks.{k}.adaLN_modulation.1" for k in range(3)), "final_layer.adaLN_modulation.1"]
ONE_BYTE = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def silent(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def tiny_fp8_bundle(build_once: Callable[..., Path], tiny_checkpoint: Path, quantize_tiny: Quantize) -> Path:
    return build_once("tiny-fp8", tiny_checkpoint, sparsity=(0.5,), quantize=quantize_tiny("fp8"))


@pytest.fixture(scope="module")
def tiny_half_bundle(build_once: Callable[..., Path], tiny_checkpoint: Path, quantize_tiny: Quantize) -> Path:
    """The tiny model in INT8 over FP16."""
    options = {"sparsity": (0.5,), "precision": "fp16", "quantize": quantize_tiny("int8")}
    return build_once("tiny-int8-fp16", tiny_checkpoint, **options)


def loaded(bundle: Bundle, kind: str) -> onnx.ModelProto:
    graph = next(graph for graph in bundle.manifest.graphs if graph.kind == kind)
    return onnx.load(bundle.onnx(graph))


def layer_tensors(model: onnx.ModelProto) -> dict[str, list[bytes]]:
    """Return the tensors of every quantized layer.

    These are its one-byte weight, and the scales and zero points of the weight and the activations.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    values = {t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        parts = [made[name] for name in node.input[:2] if name in made]
        if [part.op_type for part in parts] == ["DequantizeLinear"] * 2:
            names = [name for part in parts for name in part.input if name in values]
            found[parts[1].input[0]] = [values[name] for name in names]
    return found


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_compile_writes_the_plan_into_the_manifest(kind: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(f"tiny_{kind}_bundle"))
    plan = bundle.manifest.quantization
    assert plan is not None
    assert (plan.type, plan.method, plan.passed, plan.images) == (kind, QUANTS[kind].method, True, 4)  # type: ignore[index]
    assert bundle.manifest.precision_name == f"{kind} over fp32"
    layers = {layer.name: layer for layer in plan.layers}
    assert layers.keys() == {*STEP, *CONDITION}
    excluded = {"blocks.2.mlp.fc2"} if kind == "int8" else set()
    assert {name for name, layer in layers.items() if layer.reason == "excluded"} == excluded
    for name, layer in layers.items():
        assert layer.quantized == (layer.reason == "quantized") == (name not in excluded)
        assert layer.weight_only == (name in CONDITION)
        assert (layer.sensitivity is None) == (name in excluded)
    tokens, width = bundle.manifest.model.tokens, bundle.manifest.model.width
    # qkv after the route has all tokens of both branches. adaLN has one row of the condition.
    assert layers["blocks.2.attn.qkv"].linear_macs == 2 * tokens * 3 * width**2
    assert layers["blocks.1.attn.qkv"].linear_macs == (tokens + 8) * 3 * width**2
    assert layers["blocks.0.adaLN_modulation.1"].linear_macs == 6 * width**2
    assert layers["blocks.1.attn.qkv"].bytes_saved == 3 * 3 * width**2
    assert len(plan.quality) == 25
    assert all(-1 <= q.weak <= 1 and q.guided > 0 for q in plan.quality)
    assert 0 < plan.runs < 1 < plan.runs + 1
    assert plan.mask_noise > 0
    assert plan.time_ratio is not None


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_compile_stores_weights_of_layers_in_one_byte(
    kind: str, tiny_bundle: Path, request: pytest.FixtureRequest
) -> None:
    bundle = Bundle.open(request.getfixturevalue(f"tiny_{kind}_bundle"))
    plan = bundle.manifest.quantization
    assert plan is not None
    for graph in ("guided", "dense", "condition"):
        for tensor in loaded(bundle, graph).graph.initializer:
            name = tensor.name.removesuffix("_quantized").removesuffix(".T").removesuffix(".weight")
            if tensor.name.endswith("_quantized"):
                assert tensor.data_type == ONE_BYTE[kind], tensor.name
            elif ".weight" in tensor.name and not tensor.name.endswith(("_scale", "_zero_point")):
                assert name not in {layer.name for layer in plan.layers if layer.quantized}, tensor.name
    saved = sum(layer.bytes_saved for layer in plan.layers)
    plain, found = ((path / "graphs/weights.bin").stat().st_size for path in (tiny_bundle, bundle.path))
    # Scales and small tensors may be in the graphs' files. Alignment adds less than a page for each
    # one-byte tensor.
    assert abs(plain - saved - found) < 4096 * (len(plan.layers) + 1)
    assert found < 0.5 * plain


def test_graphs_of_all_kinds_share_one_set_of_scales_and_weights(tiny_int8_bundle: Path) -> None:
    bundle = Bundle.open(tiny_int8_bundle)
    found = [
        layer_tensors(onnx.load(bundle.onnx(graph))) for graph in bundle.manifest.graphs if graph.kind != "condition"
    ]
    assert len(found) == 5
    assert len(found[0]) == 11
    assert {len(tensors) for tensors in found[0].values()} == {5}, "weight, scale and zero point of both"
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize("name", ["tiny_int8_bundle", "tiny_fp8_bundle", "tiny_half_bundle"])
def test_quantized_bundle_runs_near_fp32(name: str, tiny_bundle: Path, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(name))
    plan = bundle.manifest.quantization
    assert plan is not None
    for graph in bundle.manifest.graphs:
        check_types(bundle.onnx(graph), bundle.manifest.precision, bundle.manifest.fp32_layers)
        onnx.checker.check_model(str(bundle.onnx(graph)))
    exact = Pipeline.load(tiny_bundle, "cpu")
    guidance = exact.guidance(sparsity=0.5, strong_sparsity=0.0)
    wanted = exact.sample([0, 1], [5, 6], steps=25, guidance=guidance)
    found = Pipeline.load(bundle.path, "cpu").sample([0, 1], [5, 6], steps=25)
    # The build measured `runs` on its own images. The bound for other images is three times that,
    # plus FP16 rounding.
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 3 * plan.runs + 0.01


def test_compile_over_fp16_has_scales_and_products_in_it(tiny_half_bundle: Path) -> None:
    bundle = Bundle.open(tiny_half_bundle)
    assert (bundle.manifest.precision, bundle.manifest.precision_name) == ("fp16", "int8 over fp16")
    assert bundle.manifest.fp32_layers == ENDS
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.time_ratio is None, "the CPU does not run it in FP16"
    saved = {layer.name: layer.bytes_saved for layer in bundle.manifest.quantization.layers}
    width = bundle.manifest.model.width
    assert saved["blocks.1.attn.qkv"] == 3 * width**2, "one byte of two in FP16"
    model = loaded(bundle, "guided")
    types = {t.name: t.data_type for t in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 2 * len(STEP)
    assert {types[node.input[1]] for node in nodes} == {TensorProto.FLOAT16}


def test_pipeline_warns_of_a_bundle_that_is_not_faster(
    tiny_int8_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """docs/quantization.md documents this warning."""
    remark = "not faster on this machine's CPU: a guided step takes 1.50 times as long as in FP32"
    content = json.loads((tiny_int8_bundle / "manifest.json").read_text())
    content["quantization"] |= {"time_ratio": 1.5, "remarks": [remark]}
    shutil.copytree(tiny_int8_bundle / "graphs", tmp_path / "graphs")
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    Pipeline.load(tmp_path, "cpu", verify_hashes=False)
    assert remark in caplog.text


@pytest.fixture
def reference(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_plan_with_gates_returns_the_worst_layers_first_and_as_few_as_possible(
    reference: Bundle, tiny_int8_bundle: Path, quantize_tiny: Quantize
) -> None:
    first = Bundle.open(tiny_int8_bundle).manifest.quantization
    assert first is not None
    options = quantize_tiny("int8", exclude=("blocks.2.mlp.fc2",))
    worst = max(q.guided for q in first.quality)
    tight = replace(options, gates=QualityGates(0.9, worst / 2), allow_quality_loss=True)
    plan, ranges = decide_quantization(reference, tight, "fp32", (), silent)
    returned = [layer for layer in plan.layers if layer.reason == "returned by the search"]
    kept = [layer for layer in plan.layers if layer.quantized]
    assert returned
    assert kept
    assert min(layer.sensitivity or 0 for layer in returned) >= max(layer.sensitivity or 0 for layer in kept)
    assert all(layer.bytes_saved == 0 for layer in returned)
    assert ranges.keys() == {layer.name for layer in kept if not layer.weight_only}
    assert [layer.sensitivity for layer in plan.layers] == [layer.sensitivity for layer in first.layers]


@given(st.integers(0, 60), st.integers(0, 60))
def test_least_is_the_first_that_passes(first: int, most: int) -> None:
    asked: list[int] = []

    def passes(count: int) -> bool:
        asked.append(count)
        return count >= first

    assert _least(passes, most) == min(first, most)
    assert len(asked) <= most.bit_length() + 1
    assert len(set(asked)) == len(asked), "no number is tried twice"


IMPOSSIBLE = QualityGates(1.0, 0.0)


def test_compile_that_fails_its_gates_writes_nothing(
    tiny_checkpoint: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    """The search is replaced by one that returns no layer, and the gates allow no difference."""
    quantize = quantize_tiny("int8", gates=QualityGates(1.0, 0.0), exclude=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "_least", lambda passes, most: 0)
        with pytest.raises(GateError, match=r"int8: expected a cosine .*: try another .* or `allow_qua") as caught:
            compile(tiny_checkpoint, CompileOptions(tmp_path / "out", (0.5,), quantize=quantize))
    assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_compile_with_allow_quality_loss_writes_it_and_every_load_warns(
    tiny_checkpoint: Path, quantize_tiny: Quantize, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize = quantize_tiny("int8", gates=IMPOSSIBLE, allow_quality_loss=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "_least", lambda passes, most: 0)
        bundle = compile(tiny_checkpoint, CompileOptions(tmp_path / "out", (0.5,), quantize=quantize))
    plan = bundle.manifest.quantization
    assert plan is not None
    assert not plan.passed
    assert plan.remarks[0].startswith("its gates do not hold: int8: expected a cosine of at least 1 ")
    caplog.set_level(logging.WARNING, logger="sg_runtime")
    Pipeline.load(bundle.path, "cpu")
    assert f"{bundle.path}: its gates do not hold" in caplog.text


def test_compile_with_no_layer_that_may_be_quantized_returns_all(reference: Bundle, quantize_tiny: Quantize) -> None:
    # FP32 itself passes, within the rounding of a cosine in float64. No quantized layer passes.
    options = quantize_tiny("int8", gates=QualityGates(1 - 1e-9, 1e-9))
    plan, ranges = decide_quantization(reference, options, "fp32", (), silent)
    assert ranges == {}
    assert {layer.reason for layer in plan.layers} == {"returned by the search"}
    assert plan.passed
    assert "not smaller: no layer is quantized" in plan.remarks
    assert plan.runs < 1e-5, "only the rounding of the branches along a run"


def test_plan_with_an_unknown_layer_names_near_ones(reference: Bundle, quantize_tiny: Quantize) -> None:
    with pytest.raises(UsageError, match=r"`exclude` blocks.1.mlp.fc: .*near: blocks.1.mlp.fc[12]"):
        decide_quantization(reference, quantize_tiny("int8", exclude=("blocks.1.mlp.fc",)), "fp32", (), silent)


def test_plan_of_another_bundle_is_taken_over_without_a_search(
    reference: Bundle, tiny_int8_bundle: Path, quantize_tiny: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "_search", None)
    plan, ranges = decide_quantization(
        reference, quantize_tiny("int8", exclude=(), like=tiny_int8_bundle), "fp32", (), silent
    )
    wanted = Bundle.open(tiny_int8_bundle).manifest.quantization
    assert wanted is not None
    assert [(layer.name, layer.quantized) for layer in plan.layers] == [(w.name, w.quantized) for w in wanted.layers]
    assert {(layer.reason, layer.sensitivity) for layer in plan.layers} == {("as in tiny-int8", None)}
    assert plan.quality == wanted.quality
    assert ranges.keys() == {layer.name for layer in plan.layers if layer.quantized and not layer.weight_only}


def test_plan_that_does_not_fit_is_refused(
    reference: Bundle, tiny_bundle: Path, tiny_int8_bundle: Path, quantize_tiny: Quantize, tmp_path: Path
) -> None:
    content = json.loads((tiny_int8_bundle / "manifest.json").read_text())
    content["quantization"]["layers"].pop(0)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for path, message in (
        (tiny_bundle, "expected a bundle in int8, found one in fp32"),
        (tmp_path, "expected a bundle with this model's 16 layers, found one of 15; only one of them has blocks.0."),
    ):
        with pytest.raises(UsageError, match=f"`like` {path}: {message}"):
            decide_quantization(reference, quantize_tiny("int8", exclude=(), like=path), "fp32", (), silent)
    with pytest.raises(UsageError, match="expected a bundle in fp8, found one in int8"):
        decide_quantization(reference, quantize_tiny("fp8", exclude=(), like=tiny_int8_bundle), "fp32", (), silent)


def test_compile_holds_the_fp32_reference_to_the_limit_of_fp32(
    tiny_checkpoint: Path, quantize_tiny: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASES, "fp32", replace(BASES["fp32"], build_limit=0.0))
    with pytest.raises(ExportError, match="relative L2"):
        compile(tiny_checkpoint, CompileOptions(tmp_path / "out", (0.5,), quantize=quantize_tiny("int8")))
    assert not list(tmp_path.iterdir())


def test_plan_with_the_table_of_another_checkpoint_is_refused(tiny_edm_bundle: Path, quantize_tiny: Quantize) -> None:
    with pytest.raises(CalibrationError, match="found ranges of model"):
        decide_quantization(Bundle.open(tiny_edm_bundle), quantize_tiny("int8"), "fp32", (), silent)


def test_plan_with_a_table_that_lacks_a_layer_is_refused(
    reference: Bundle, quantize_tiny: Quantize, tiny_ranges: Path, tmp_path: Path
) -> None:
    content = json.loads(tiny_ranges.read_text())
    del content["layers"]["blocks.0.attn.qkv"]
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=r"blocks.0.attn.qkv"):
        decide_quantization(reference, quantize_tiny("int8", table=tmp_path / "table.json"), "fp32", (), silent)


def classes_of(conditions: Conditions) -> list[int]:
    classes: list[int] = conditions.rows(weak=False)["class"].tolist()
    return classes


def test_plan_takes_images_for_search_and_gates_that_calibration_has_not(
    reference: Bundle, quantize_tiny: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    real = quantization.walk

    def watched(*arguments: Any, noise: bool = True) -> Any:
        seen[noise] |= set(zip(classes_of(arguments[3]), arguments[4], strict=True))
        return real(*arguments, noise=noise)

    monkeypatch.setattr(quantization, "walk", watched)
    monkeypatch.setattr(quantization, "_least", lambda passes, most: 0)
    decide_quantization(reference, quantize_tiny("int8"), "fp32", (), silent)
    conditions, seeds = images_of("calibration", reference.manifest.model, 2)
    calibration = set(zip(classes_of(conditions), seeds, strict=True))
    for place in (0, 1):  # classes, seeds
        sets = [{image[place] for image in images} for images in (calibration, seen[True], seen[False])]
        assert sum(map(len, sets)) == len(set.union(*sets))


def test_measure_ranges_takes_a_users_shards(reference: Bundle, tiny_ranges: Path) -> None:
    table = quantization.measure_ranges(reference, FeedSettings(), tiny_ranges.parent / "feeds", None, silent)
    assert json.loads(tiny_ranges.read_text())["layers"].keys() == table.layers.keys()


def engine_options(output: Path, kind: str, sms: Sequence[int], quantize: QuantizeOptions | None) -> CompileOptions:
    return CompileOptions(
        output,
        (0.5,),
        precision="fp16",
        engines=EngineOptions(compute_capabilities=tuple(sms)),
        quantize=quantize,
    )


@pytest.mark.parametrize(
    ("kind", "sms", "message"),
    [
        ("fp8", (), "`precision` fp8: expected `compute_capabilities` of 89 or above for TensorRT-RTX"),
        (
            "fp8",
            (86,),
            "86: expected matrix products in bf16, fp16, fp32, int8, found fp8: .*: 89, 120, 121",
        ),
        ("fp8", (89, 86), "`compute_capabilities` 86: "),
        ("int8", (75,), "`compute_capabilities` 75: expected matrix products in fp16, found int8"),
    ],
)
def test_options_of_engines_for_gpus_without_the_type_are_refused(
    kind: Any, sms: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        engine_options(tmp_path / "out", kind, sms, QuantizeOptions(kind))


@pytest.fixture(scope="module")
def wide_checkpoint(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint with one block, which is the route.

    Its layers have 800 thousand weights, which is more than the code of an engine.
    """
    config = replace(tiny.config, depth=1, width=256, mlp_width=1024)
    wide = replace(tiny, config=config, facts={**tiny.facts, "route": "0-0"})
    path: Path = wide.save(tmp_path_factory.mktemp("wide") / "wide.safetensors")
    return path


@pytest.fixture(scope="module")
def plain_engine_size(wide_checkpoint: Path) -> int:
    """Size in bytes of the guided FP16 engine for SM 8.9."""
    bundle = compile(wide_checkpoint, engine_options(wide_checkpoint.parent / "fp16", "int8", (89,), None))
    return guided_engine_size(bundle)


def guided_engine_size(bundle: Bundle) -> int:
    (engine,) = (engine for engine in bundle.manifest.engines if engine.kind == "guided")
    return bundle.manifest.files[engine.file].size


# INT8 and FP8, each for GPUs that support it.
@pytest.mark.parametrize(("kind", "sms"), [("int8", (86, 89, 120)), ("fp8", (89, 120))])
def test_compile_builds_engines_of_one_byte_weights(
    kind: Any, sms: tuple[int, ...], wide_checkpoint: Path, plain_engine_size: int, tmp_path: Path
) -> None:
    quantize = QuantizeOptions(
        kind, feeds=FeedSettings(1), gates=QualityGates(0.0, 10.0), search_images=1, gate_images=1
    )
    for sm in sms:
        bundle = compile(wide_checkpoint, engine_options(tmp_path / f"{kind}-{sm}", kind, (sm,), quantize))
        quantize = replace(quantize, like=bundle.path)  # no search for the same layers again
        assert bundle.manifest.precision_name == f"{kind} over fp16"
        assert {engine.compute_capabilities for engine in bundle.manifest.engines} == {(sm,)}
        plan = bundle.manifest.quantization
        assert plan is not None
        assert all(layer.quantized for layer in plan.layers)
        # The 786432 weights of the block's layers lose a byte each. The kernels of the two engines
        # may differ by some 100 kB.
        assert guided_engine_size(bundle) < plain_engine_size - 500_000, sm


def test_compile_on_a_full_disk_leaves_nothing(
    tiny_checkpoint: Path, quantize_tiny: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the quantized graphs are written, after the FP32 graphs."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sg_export.quantize.rewrite.quantized_models", full)
    monkeypatch.setattr(quantization, "_least", lambda passes, most: 0)
    with pytest.raises(ExportError, match="the disk is full"):
        compile(tiny_checkpoint, CompileOptions(tmp_path / "out", (0.5,), quantize=quantize_tiny("int8")))
    assert not list(tmp_path.iterdir())
