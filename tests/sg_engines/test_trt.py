"""Real engines of small graphs; TensorRT-RTX builds them without a GPU."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx
from onnx import ModelProto, helper, load, parser, save

import sg_engines.trt
from sg_engines.trt import FLAGS, EngineRecipe, build_engine, builder_flags, has_timing_cache
from sg_runtime.backends.rtx_header import PlanHeader, read_rtx_header
from sg_runtime.errors import EngineError

Products = Mapping[str, Path]


def ignore(phase: str, done: int, steps: int) -> None:
    """Ignore progress."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Path of an engine to build, in an empty folder."""
    (tmp_path / "engines").mkdir()
    return tmp_path / "engines/product.engine"


def refused(graph: Path, plan: EngineRecipe, output: Path) -> str:
    """Return the message of a build that fails and leaves nothing."""
    with pytest.raises(EngineError) as caught:
        build_engine(tensorrt_rtx, graph, plan, output, ignore)
    assert caught.value.exit_code == 4
    assert list(output.parent.iterdir()) == []
    return str(caught.value)


def altered(graph: Path, folder: Path, change: Callable[[ModelProto], object]) -> Path:
    """Apply `change` to a graph and return the path of the result."""
    model = load(graph)
    change(model)
    save(model, folder / "altered.onnx")
    return folder / "altered.onnx"


VERSION = tensorrt_rtx.__version__


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_build_engine_of_every_type_gives_a_plan_for_the_gpu(
    products: Products, plan: EngineRecipe, output: Path, kind: str
) -> None:
    build_engine(tensorrt_rtx, products[kind], plan, output, ignore)
    assert read_rtx_header(output) == PlanHeader(VERSION, (86,))
    assert list(output.parent.iterdir()) == [output], "no temporary file is left"


def test_build_engine_twice_gives_the_same_bytes(
    products: Products, plan: EngineRecipe, engine: Path, output: Path
) -> None:
    """A cache needs this: a key then identifies one engine. The build replaces an existing file."""
    output.write_bytes(b"an older one")
    build_engine(tensorrt_rtx, products["fp16"], plan, output, ignore)
    assert output.read_bytes() == engine.read_bytes()


def test_build_engine_of_two_profiles_holds_kernels_for_both(
    products: Products, plan: EngineRecipe, engine: Path, output: Path
) -> None:
    """This engine is nearly all code, and a second profile adds the same amount of code."""
    build_engine(
        tensorrt_rtx, products["fp16"], replace(plan, profiles=({"x": (2, 16)}, {"x": (5, 16)})), output, ignore
    )
    assert output.stat().st_size > 1.5 * engine.stat().st_size


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("fp16", (75,), (75,)),
        ("fp16", (121, 75), (75, 121)),
        ("bf16", (80, 86, 89), (80, 86, 89)),
        ("fp32", (), (80, 86, 89, 120, 121)),
    ],
)
def test_build_engine_for_given_gpus_is_for_these(
    products: Products, plan: EngineRecipe, output: Path, kind: str, asked: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """If no GPU is given, the library chooses."""
    build_engine(tensorrt_rtx, products[kind], replace(plan, compute_capabilities=asked), output, ignore)
    assert read_rtx_header(output).compute_capabilities == expected


def test_build_engine_with_a_workspace_gives_other_bytes(
    products: Products, plan: EngineRecipe, engine: Path, output: Path
) -> None:
    """The workspace reached the library, so it belongs in the cache key."""
    build_engine(tensorrt_rtx, products["fp16"], replace(plan, workspace=1 << 30), output, ignore)
    assert output.stat().st_size == engine.stat().st_size
    assert output.read_bytes() != engine.read_bytes()


@pytest.mark.parametrize(("name", "kind"), [("TF32", "fp32"), ("REQUIRE_USER_ALLOCATION", "fp16")])
def test_build_engine_without_a_flag_gives_other_bytes(
    products: Products, plan: EngineRecipe, output: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """The flags reached the library, so they belong in the cache key."""
    build_engine(tensorrt_rtx, products[kind], plan, output, ignore)
    content = output.read_bytes()
    monkeypatch.setattr(sg_engines.trt, "FLAGS", {k: v for k, v in FLAGS.items() if k != name})
    build_engine(tensorrt_rtx, products[kind], plan, output, ignore)
    assert output.read_bytes() != content


def test_build_engine_has_no_tf32_and_allocates_nothing_when_it_runs(
    products: Products, plan: EngineRecipe, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, flag, seen = tensorrt_rtx.Builder.build_serialized_network, tensorrt_rtx.BuilderFlag, []

    def build(builder: Any, network: Any, config: Any) -> Any:
        seen.append((config.get_flag(flag.TF32), config.get_flag(flag.REQUIRE_USER_ALLOCATION)))
        return real(builder, network, config)

    monkeypatch.setattr(tensorrt_rtx.Builder, "build_serialized_network", build)
    build_engine(tensorrt_rtx, products["fp32"], plan, output, ignore)
    assert seen == [(False, True)]


def test_builder_flags_are_those_that_the_library_has() -> None:
    assert builder_flags(tensorrt_rtx) == FLAGS
    assert builder_flags(SimpleNamespace(BuilderFlag=SimpleNamespace(TF32=7))) == {"TF32": False}  # as TensorRT has


@pytest.mark.parametrize("number", [0, 1])
def test_build_engine_asks_for_a_strongly_typed_network_by_the_librarys_number(
    products: Products, plan: EngineRecipe, output: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """TensorRT 10 numbers the flag 1. Without it, TensorRT 10 would choose types itself."""
    real, asked = tensorrt_rtx.Builder.create_network, []
    monkeypatch.setattr(tensorrt_rtx, "NetworkDefinitionCreationFlag", SimpleNamespace(STRONGLY_TYPED=number))
    monkeypatch.setattr(
        tensorrt_rtx.Builder, "create_network", lambda builder, flags: asked.append(flags) or real(builder)
    )
    build_engine(tensorrt_rtx, products["fp16"], plan, output, ignore)
    assert asked == [1 << number]


def test_build_engine_beyond_its_workspace_says_so(products: Products, plan: EngineRecipe, output: Path) -> None:
    message = refused(products["fp16"], replace(plan, workspace=1), output)
    assert message.startswith(f"fp16.onnx: TensorRT-RTX {VERSION} cannot build it: ")
    assert "workspace limit" in message


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("fp32", ("'multiply'", "SM75", "FP32 GEMM is not supported")),
        ("bf16", ("sm75", "HW-specific datatypes: b16")),
    ],
)
def test_build_engine_of_a_type_that_a_gpu_has_not_gives_the_librarys_reason(
    products: Products, plan: EngineRecipe, output: Path, kind: str, reasons: tuple[str, ...]
) -> None:
    message = refused(products[kind], replace(plan, compute_capabilities=(75,)), output)
    assert message.startswith(f"{kind}.onnx: TensorRT-RTX {VERSION} cannot build it: ")
    for reason in reasons:
        assert reason in message


@pytest.mark.parametrize(
    ("profiles", "reason"),
    [
        (({"x": (2, 8)},), "profile has min=8, opt=8, max=8 but tensor has 16"),
        (({"x": (2, 16)}, {"x": (2, 16, 1)}), "tensor x has 2 dimensions but profile 1 has 3 dimensions"),
        (({"z": (2, 16)},), "input tensor x is missing dimensions in profile 0"),
        ((), "no optimization profile has been defined"),
    ],
    ids=["size", "rank", "name", "none"],
)
def test_build_engine_of_a_profile_that_the_graph_does_not_take_gives_the_librarys_reason(
    products: Products, plan: EngineRecipe, output: Path, profiles: Any, reason: str
) -> None:
    message = refused(products["fp16"], replace(plan, profiles=profiles), output)
    assert message.startswith(f"fp16.onnx: TensorRT-RTX {VERSION} cannot build it: ")
    assert reason in message


def test_build_engine_of_a_profile_that_the_library_refuses_names_it(
    products: Products, plan: EngineRecipe, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No profile is known that the library refuses so early, but its documentation allows it."""
    monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "add_optimization_profile", lambda config, profile: -1)
    assert refused(products["fp16"], plan, output) == (
        f"fp16.onnx: TensorRT-RTX {VERSION} refuses the profile {{'x': (2, 16)}}: it gives no reason"
    )


def surprise(model: ModelProto, *nodes: int) -> None:
    """Turn these nodes into operators of another domain."""
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    for node in nodes:
        model.graph.node[node].op_type, model.graph.node[node].domain = "Surprise", "com.microsoft"


def test_build_engine_of_an_unknown_operator_names_every_such_node(
    products: Products, plan: EngineRecipe, output: Path, tmp_path: Path
) -> None:
    def change(model: ModelProto) -> None:
        surprise(model, 1, 2)
        model.graph.node[2].name = ""

    message = refused(altered(products["fp16"], tmp_path, change), plan, output)
    assert message.startswith(f"altered.onnx: TensorRT-RTX {VERSION} cannot parse it: node multiply (Surprise): ")
    assert "; node ? (Surprise): " in message


def test_build_engine_of_a_scatter_that_adds_names_it(plan: EngineRecipe, output: Path, tmp_path: Path) -> None:
    """Kept tokens are scattered back among the others; TensorRT-RTX has no scatter that adds."""
    graph = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[4, 2] x, int64[3, 1] places, float[3, 2] updates) => (float[4, 2] y)
        { [add] y = ScatterND <reduction = "add"> (x, places, updates) }
    """)
    save(graph, tmp_path / "g.onnx")
    message = refused(tmp_path / "g.onnx", replace(plan, profiles=()), output)
    assert message.startswith(f"g.onnx: TensorRT-RTX {VERSION} cannot parse it: node add (ScatterND): ")


def test_build_engine_of_a_graph_without_its_weights_names_them(
    products: Products, plan: EngineRecipe, output: Path, tmp_path: Path
) -> None:
    save(load(products["fp16"]), tmp_path / "g.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    message = refused(tmp_path / "g.onnx", plan, output)
    assert message.startswith(f"g.onnx: TensorRT-RTX {VERSION} cannot parse it: node ? (?): ")
    assert message.endswith("Failed to import initializer: w")


@pytest.mark.parametrize("content", [b"", b"no graph", None], ids=["empty", "text", "gone"])
def test_build_engine_of_no_graph_names_it(
    plan: EngineRecipe, output: Path, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "g.onnx").write_bytes(content)
    assert refused(tmp_path / "g.onnx", plan, output).startswith(f"g.onnx: TensorRT-RTX {VERSION} ")


def test_build_engine_reports_each_phase_from_its_first_step_to_its_last(
    products: Products, plan: EngineRecipe, output: Path
) -> None:
    events: list[tuple[str, int, int]] = []
    build_engine(tensorrt_rtx, products["fp16"], plan, output, lambda *event: events.append(event))
    phases = list(dict.fromkeys(phase for phase, _, _ in events))
    assert len(phases) >= 3
    assert phases[-1] == "Building engine from subgraph"
    together = [[event for event in events if event[0] == phase] for phase in phases]
    assert [event for own in together for event in own] == events, "the phases do not overlap"
    for own in together:
        steps = own[0][2]
        assert [(done, of) for _, done, of in own] == [(done, steps) for done in range(steps + 1)]


def test_has_timing_cache_of_rtx_is_false_and_of_tensorrt_true() -> None:
    """Only RTX has a runtime cache, which identifies it; `test_trt_names` checks TensorRT."""
    assert not has_timing_cache(tensorrt_rtx)
    assert has_timing_cache(SimpleNamespace())


# TensorRT-RTX also has the methods of timing caches, but they do nothing.
no_operations = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")


@no_operations
@pytest.mark.parametrize("content", [None, b"", b"a cache"], ids=["new", "empty", "there"])
def test_build_engine_with_a_timing_cache_writes_it(
    products: Products, plan: EngineRecipe, engine: Path, output: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "timing.cache"
    if content is not None:
        path.write_bytes(content)
    build_engine(tensorrt_rtx, products["fp16"], replace(plan, timing_cache=path), output, ignore)
    written = path.read_bytes()
    assert written
    assert written != content
    assert output.read_bytes() == engine.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"engines", "timing.cache"}


@no_operations
def test_build_engine_with_a_timing_cache_gives_the_library_what_was_there(
    products: Products, plan: EngineRecipe, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, given = tensorrt_rtx.IBuilderConfig.create_timing_cache, []
    path = tmp_path / "timing.cache"
    path.write_bytes(b"a cache")
    monkeypatch.setattr(
        tensorrt_rtx.IBuilderConfig,
        "create_timing_cache",
        lambda config, content: given.append(content) or real(config, content),
    )
    build_engine(tensorrt_rtx, products["fp16"], replace(plan, timing_cache=path), output, ignore)
    assert given == [b"a cache"]


@no_operations
def test_build_engine_with_a_timing_cache_that_cannot_be_written_warns(
    products: Products,
    plan: EngineRecipe,
    engine: Path,
    output: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "none" / "timing.cache"
    build_engine(tensorrt_rtx, products["fp16"], replace(plan, timing_cache=path), output, ignore)
    assert output.read_bytes() == engine.read_bytes()
    assert caplog.messages == [f"timing cache {path}: not written (No such file or directory)"]


@no_operations
def test_build_engine_with_a_timing_cache_of_another_gpu_names_it(
    products: Products, plan: EngineRecipe, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX accepts any timing cache; TensorRT returns False for one that it cannot use."""
    path = tmp_path / "timing.cache"
    path.write_bytes(b"a cache")
    monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "set_timing_cache", lambda config, cache, ignore_mismatch: False)
    assert refused(products["fp16"], replace(plan, timing_cache=path), output) == (
        f"{path}: expected a timing cache of this TensorRT and this GPU: give another, or delete it"
    )
    assert path.read_bytes() == b"a cache"
