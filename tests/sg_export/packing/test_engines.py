"""Bundles with engines: real TensorRT-RTX builds of tiny models.

The builds need no GPU.
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from sg_engines.trt import EngineRecipe, build_engine
from sg_export.compiler import compile
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel, load_model
from sg_export.models.dit import ENDS
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_export.options.quantize import QuantizeOptions
from sg_export.packing import engines
from sg_export.packing.engines import check_libraries, check_timing_cache, count_fused_attention, profile_shapes
from sg_runtime.backends.rtx_header import read_rtx_header
from sg_runtime.bundle import Bundle
from sg_runtime.devices.gpus import Gpu
from sg_runtime.errors import EngineError, ExportError, MissingExtraError, UsageError
from sg_runtime.manifest import EngineFacts, Precision, Profile

pytestmark = pytest.mark.slow


def engines_of(bundle: Bundle) -> dict[str, EngineFacts]:
    return {Path(engine.file).name.partition(".")[0]: engine for engine in bundle.manifest.engines}


# Block 0 is before the route and has one attention. The others are in the route or after it, and
# each of them has two attentions. In BF16, the last block is in FP32, which has no fused kernel.
@pytest.mark.parametrize(("precision", "gpus", "attentions"), [("fp32", (), 0), ("fp16", (89,), 5), ("bf16", (89,), 3)])
def test_compile_makes_one_engine_for_all_sparsities(
    precision: Precision, gpus: tuple[int, ...], attentions: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    engine_options = EngineOptions(batch=(1, 4), compute_capabilities=gpus)
    options = CompileOptions(tmp_path / "out", (0.5, 0.9), precision=precision, engines=engine_options)
    bundle = compile(tiny_checkpoint, options)
    tokens, half, few = 16, 8, 2
    guided = f"guided-{tokens}-K"
    assert bundle == Bundle.open(bundle.path)
    assert {path.name for path in bundle.path.iterdir()} == {"manifest.json", "engines"}
    manifest, engines = bundle.manifest, engines_of(bundle)
    assert manifest.precision == precision
    after = {"fp32": (), "fp16": ENDS, "bf16": (*ENDS, "blocks.2")}
    assert manifest.fp32_layers == after[precision]
    assert [(graph.name, graph.file) for graph in manifest.graphs] == [
        (graph, None) for graph in ("condition", f"guided-{tokens}-{half}", f"guided-{tokens}-{few}")
    ]
    assert engines["condition"].profiles == (Profile(40, ()),)
    assert engines[guided].profiles == tuple(Profile(batch, (tokens, keep)) for batch in (1, 4) for keep in (half, few))
    # Rounding, with only some matmuls in half precision: when measured, 2e-4 in FP16, 2e-3 in BF16
    # and 1e-6 in FP32.
    bounds = {"fp32": (0, 1e-5), "fp16": (1e-5, 2e-3), "bf16": (1e-4, 2e-2)}
    for graph in manifest.graphs:
        assert graph.parity is not None
        assert bounds[precision][0] < graph.parity < bounds[precision][1]
    for engine in engines.values():
        path = bundle.file(engine.file)
        assert (engine.library, engine.version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
        header = read_rtx_header(path)
        assert (header.version, header.compute_capabilities) == (engine.version, engine.compute_capabilities)
        assert engine.fused_attention == count_fused_attention(path)
        assert engine.build_seconds > 0
        assert 5e7 < engine.build_memory_bytes < 2e9
    assert engines["condition"].fused_attention == 0
    assert engines[guided].fused_attention == attentions * 4
    for graph, keep in zip(manifest.graphs[1:], (half, few), strict=True):
        assert manifest.engine(graph, 4) == (engines[guided], 2 if keep == half else 3)
        assert manifest.engine(graph, 3) is None


Build = Callable[..., Bundle]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages of sg-export, without the subject before the colon."""
    return [record.getMessage().partition(": ")[2] for record in caplog.records if record.name == "sg_export"]


@pytest.fixture
def build(quick_checkpoint: Path, tmp_path: Path) -> Build:
    """Return a function that builds FP16 engines of the quick model for SM 8.9.

    The only block of the model is the route.
    """

    def build(output: str = "out", guidance: dict[str, Any] | None = None, **changes: Any) -> Bundle:
        settings = {"sparsity": (0.5,)} if guidance is None else guidance
        engine_options = EngineOptions(**{"compute_capabilities": (89,), **changes})
        options = CompileOptions(tmp_path / output, **settings, precision="fp16", engines=engine_options)
        return compile(quick_checkpoint, options)

    return build


def test_compile_records_the_gpus_that_were_asked_for(build: Build) -> None:
    for engine in build(compute_capabilities=(120, 86)).manifest.engines:
        assert engine.compute_capabilities == (86, 120)


def test_compile_for_gpus_without_fp32_products_has_none(build: Build) -> None:
    manifest = build(compute_capabilities=(75, 89)).manifest
    assert manifest.fp32_layers == ()
    assert {engine.compute_capabilities for engine in manifest.engines} == {(75, 89)}


GUIDED = {"condition", "guided-16-K"}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sparsity": (0.5,), "strong_sparsity": (0.0, 0.25)}, {*GUIDED, "guided-K-K"}),
        ({"sparsity": (0.5,), "guidance": "cfg+sg"}, {"condition", "guided-16-K-null"}),
        ({"guidance": "cfg"}, {"condition", "guided-16-16-null"}),
        ({"guidance": "none"}, {"condition", "dense"}),
        ({"sparsity": (0.5,), "interval": (0.2, 0.8)}, {*GUIDED, "dense", "sparse-K"}),
        ({"weak_checkpoint": True}, {"condition", "dense", "weak-condition", "weak-sparse-K"}),
    ],
    ids=["two strong", "cfg+sg", "cfg", "none", "interval", "autoguidance"],
)
def test_compile_builds_engines_of_what_the_plan_uses(
    changes: dict[str, Any], names: set[str], build: Build, quick: Any, tmp_path: Path
) -> None:
    if "weak_checkpoint" in changes:
        changes = {
            "sparsity": (0.5,),
            "weak_checkpoint": quick.save(tmp_path / "weak.safetensors", quick.state(seed=2)),
        }
    bundle = build(guidance=changes)
    assert engines_of(bundle).keys() == names
    for graph in bundle.manifest.graphs:
        assert bundle.manifest.engine(graph, 40 if graph.kind == "condition" else 1) is not None, graph.name


def test_compile_with_keep_onnx_has_the_graphs_that_the_engines_were_built_from(build: Build) -> None:
    bundle = build(keep_onnx=True)
    assert engines_of(bundle).keys() == GUIDED
    assert {graph.name: graph.file for graph in bundle.manifest.graphs} == {
        "condition": "graphs/condition.onnx",
        "dense": "graphs/dense.onnx",
        "sparse-8": "graphs/sparse-K.onnx",
        "guided-16-8": "graphs/guided-16-K.onnx",
    }
    assert bundle.onnx(bundle.manifest.graphs[0]).is_file()


def test_compile_again_takes_engines_from_the_cache(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sg_export")
    cache = tmp_path / "cache"
    first = build(cache=cache)
    assert told(caplog) == [f"miss: no engine of {name} in {cache}" for name in ("condition", "guided-16-K")]
    caplog.clear()
    monkeypatch.setattr(engines, "build_in_child", None)  # nothing is built
    second = build("again", cache=cache)
    assert told(caplog) == ["hit", "hit"]
    assert second.manifest == first.manifest


def test_compile_with_a_cache_that_cannot_be_written_warns_and_builds(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    bundle = build(cache=tmp_path / "file/cache")
    assert engines_of(bundle).keys() == GUIDED
    assert [record.getMessage() for record in caplog.records if record.name == "sg_export"] == [
        f"engine cache {tmp_path}/file/cache: {name} is not kept (Not a directory)" for name in sorted(GUIDED)
    ]


def test_open_cache_without_a_home_warns_and_gives_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("SG_EXPORT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert engines._open_cache(None) is None
    assert caplog.messages == ["engine cache ~/.cache/sg-export: not used (no home folder; set SG_EXPORT_CACHE)"]


def test_compile_with_another_batch_says_what_differs(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache=tmp_path / "cache")
    caplog.set_level(logging.INFO, logger="sg_export")
    build("again", cache=tmp_path / "cache", batch=(2,), workspace=1 << 28)
    assert told(caplog) == ["miss: different workspace", "miss: different profiles, workspace"]


def test_compile_of_unfused_attention_fails_unless_it_is_allowed(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "FUSED_ATTENTION", rb"a kernel that no plan has")
    with pytest.raises(
        EngineError, match=r"guided-16-K\..*: expected 2 fused attention kernels.*found 0: .*`allow_unf"
    ):
        build()
    assert [path.name for path in tmp_path.iterdir()] == []
    engine = engines_of(build(allow_unfused=True))["guided-16-K"]
    assert engine.fused_attention == 0
    assert "guided-16-K" in caplog.text


def test_compile_of_an_engine_of_another_size_fails(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CODE_BYTES", 0)
    with pytest.raises(EngineError, match=r"condition\..*: expected 0.1 to 0.1 MB for weights of 0.1 MB, found .* MB"):
        build()


def test_compile_of_a_plan_for_other_gpus_fails(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(path: Path) -> Any:
        return replace(read_rtx_header(path), compute_capabilities=(86,))

    monkeypatch.setattr(engines, "read_rtx_header", other)
    with pytest.raises(
        EngineError, match=r"expected a plan of TensorRT-RTX .* for \(89,\), found one of .* for \(86,\)"
    ):
        build()


def test_compile_with_a_timing_cache_warns_that_it_has_none(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(timing_cache=tmp_path / "timing.cache")
    assert told(caplog) == ["TensorRT-RTX has no timing cache; the file is not used"]
    assert not (tmp_path / "timing.cache").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "Is a directory"),
        ("none/timing.cache", "No such file or directory"),
        ("file/timing.cache", "Not a directory"),
    ],
)
def test_check_timing_cache_that_cannot_be_written_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / name
    check_timing_cache(EngineOptions(timing_cache=path))  # TensorRT-RTX has none
    monkeypatch.setattr(engines, "has_timing_cache", lambda library: True)  # as TensorRT has
    with pytest.raises(UsageError) as caught:
        check_timing_cache(EngineOptions(timing_cache=path))
    assert str(caught.value) == (f"`timing_cache` {path}: cannot be read and written ({reason}): give another file")
    check_timing_cache(EngineOptions(timing_cache=tmp_path / "new.cache"))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_compile_of_weights_out_of_range_names_the_first_product(quick: Any, tmp_path: Path) -> None:
    state = quick.state()
    state["blocks.0.mlp.fc1.weight"] *= 1e5
    path = quick.save(tmp_path / "huge.safetensors", state)
    with pytest.raises(
        ExportError, match=r"values in the range of fp16, found larger values from blocks.0.mlp.fc1/(MatMul|Add) on"
    ):
        compile(path, CompileOptions(tmp_path / "out", (0.5,), precision="fp16"))
    assert compile(
        path, CompileOptions(tmp_path / "out", (0.5,), precision="bf16", engines=EngineOptions(keep_onnx=True))
    )


def test_check_libraries_for_tensorrt_without_a_gpu_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_gpus", lambda: ())
    with pytest.raises(
        EngineError, match="found no GPU: build on the machine with that GPU, or give `libraries` tensorrt_rtx"
    ) as e:
        check_libraries(("tensorrt",))
    assert e.value.exit_code == 4


def test_check_libraries_that_are_not_installed_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_gpus", lambda: (Gpu("NVIDIA H100", 90),))
    for library, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
        with pytest.raises(MissingExtraError, match=rf"{library} is not installed: pip install -e '\.\[{extra}\]'"):
            check_libraries((library,))  # type: ignore[arg-type]


def test_check_libraries_that_are_too_old_names_the_version_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 8 and 10.0 to 10.2 lack names that the engines' builder and runtime use."""
    monkeypatch.setattr(metadata, "requires", lambda _: ["tensorrt-rtx>=99; extra == 'tensorrt-rtx'"])
    with pytest.raises(MissingExtraError, match=r"^tensorrt-rtx 1\.\S+ is older than 99, which sg-export needs: pip"):
        check_libraries(("tensorrt_rtx",))


def test_check_libraries_for_a_gpu_without_a_type_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_gpus", lambda: (Gpu("Orin", 87),))
    quantized = EngineOptions(("tensorrt",)).products("fp16", "fp8")
    with pytest.raises(UsageError, match=r"`precision`: Orin \(SM 87\): .* found fp8: give another precision"):
        check_libraries(("tensorrt",), quantized)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "precision: expected one of fp32, fp16, bf16, found 'fp8'"),
        (
            {"engines": EngineOptions(("tensorrt",), compute_capabilities=(90,))},
            "`compute_capabilities` 90: TensorRT builds for the GPU that it runs",
        ),
        ({"batch": 2, "engines": EngineOptions()}, "batch: expected none next to engines, which have image counts"),
        ({"precision": "bf16"}, "precision bf16: ONNX Runtime's CPU"),
        ({"onnx_target": "cuda"}, "onnx_target: expected one of onnxruntime, onnxruntime-cuda, found 'cuda'"),
        ({"onnx_target": "onnxruntime-cuda", "engines": EngineOptions()}, "onnxruntime-cuda: expected no engines"),
        (
            {"onnx_target": "onnxruntime-cuda", "quantize": QuantizeOptions("int8")},
            "onnxruntime-cuda: expected no quantization, found int8: .* give `precision` fp16, or `onnx_target`",
        ),
    ],
    ids=str,
)
def test_options_that_no_target_serves_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        CompileOptions(tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"libraries": ()}, "engines: expected at least one library and one image count, found none"),
        ({"batch": ()}, "engines: expected at least one library and one image count, found none"),
        ({"batch": (1, 0)}, "batch: expected at least 1, found 0"),
    ],
    ids=str,
)
def test_engine_options_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineOptions(**settings)


def test_compile_for_both_targets_has_graphs_for_one_and_engines_for_the_other(build: Build) -> None:
    bundle = build(guidance={"guidance": "none"}, keep_onnx=True)
    assert engines_of(bundle).keys() == {"condition", "dense"}
    assert all(graph.file is not None for graph in bundle.manifest.graphs)
    assert json.loads((bundle.path / "manifest.json").read_text())["batch"] is None


def guided_spec(loaded: LoadedModel, strong: float) -> GraphSpec:
    return GraphSpec("guided", (loaded.level(strong), loaded.level(0.5)))


@pytest.mark.parametrize(
    ("strong", "kept"),
    [
        (0.0, {"rows_weak": (3, 8), "restore_weak": (3, 16)}),
        (0.25, {"rows_strong": (3, 12), "restore_strong": (3, 16), "rows_weak": (3, 8), "restore_weak": (3, 16)}),
    ],
)
def test_profile_shapes_have_a_row_for_each_kept_token_and_for_each_token(
    tiny_checkpoint: Path, strong: float, kept: dict[str, tuple[int, ...]]
) -> None:
    loaded = load_model(tiny_checkpoint)
    spec = guided_spec(loaded, strong)
    shapes = profile_shapes(Profile(3, tuple(level.keep for level in spec.levels)), spec, loaded.facts)
    latent = (3, *loaded.facts.latent)
    assert shapes == {"x": latent, "r": latent, "modulations": (3, loaded.facts.held["modulations"][0]), **kept}


@pytest.mark.parametrize(("batch", "symbolic"), [(None, True), (3, False)], ids=["any sizes", "one size"])
def test_engine_of_rows_that_the_runtime_uploads_is_built(
    tiny_checkpoint: Path, tmp_path: Path, batch: int | None, symbolic: bool
) -> None:
    """The profile also fits graphs with fixed sizes, which are those of the profile."""
    loaded = load_model(tiny_checkpoint)
    spec = guided_spec(loaded, 0.25)
    (model,) = trace(loaded.model, [spec], loaded.facts, batch, DEFAULT_OPSET, symbolic_keep=symbolic)
    (path,) = write_graphs([model], tmp_path, "weights.bin")
    shapes = profile_shapes(Profile(3, (12, 8)), spec, loaded.facts)
    build_engine(tensorrt_rtx, path, EngineRecipe((shapes,), (86,)), tmp_path / "plan", lambda *_: None)
    assert read_rtx_header(tmp_path / "plan").compute_capabilities == (86,)
