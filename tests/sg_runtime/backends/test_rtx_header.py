"""The header of TensorRT-RTX plans, and of files that are not plans."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, save

from sg_engines.trt import EngineRecipe, build_engine
from sg_runtime.backends.rtx_header import PlanHeader, read_rtx_header
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError

HEADER_BYTES = 36


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the graph y = x + x in half precision, which every GPU supports."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    path = tmp_path_factory.mktemp("plans") / "g.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def built(graph: Path) -> Callable[..., Path]:
    """Return a function that builds a plan for the given GPUs."""

    def built(*numbers: int) -> Path:
        path = graph.with_name(f"{'-'.join(map(str, numbers))}.engine")
        build_engine(tensorrt_rtx, graph, EngineRecipe((), numbers), path, lambda *progress: None)
        return path

    return built


@pytest.mark.parametrize("numbers", [(75,), (80,), (121,), (75, 120, 121), (80, 86, 89)])
def test_read_rtx_header_gives_what_the_plan_was_built_for(
    built: Callable[..., Path], numbers: tuple[int, ...]
) -> None:
    header = read_rtx_header(built(*numbers))
    assert header == PlanHeader(tensorrt_rtx.__version__, numbers)


def test_read_rtx_header_of_the_librarys_own_choice_gives_it(engine_bundle: Path) -> None:
    """The default is every GPU except 7.5, as `sg-export build --help` states."""
    bundle = Bundle.open(engine_bundle)
    for engine in bundle.manifest.engines:
        header = read_rtx_header(bundle.file(engine.file))
        assert header == PlanHeader(engine.version, engine.compute_capabilities)
        assert header.compute_capabilities == (80, 86, 89, 120, 121)


def test_read_rtx_header_needs_no_more_than_the_header(engine_bundle: Path, tmp_path: Path) -> None:
    whole = next((engine_bundle / "engines").iterdir())
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:HEADER_BYTES])
    assert read_rtx_header(tmp_path / "cut") == read_rtx_header(whole)


def test_read_rtx_header_leaves_out_gpus_that_it_does_not_know(engine_bundle: Path, tmp_path: Path) -> None:
    start = bytearray(next((engine_bundle / "engines").iterdir()).read_bytes()[:HEADER_BYTES])
    start[32:36] = b"\x04\xff\xff\xff"
    (tmp_path / "newer").write_bytes(start)
    assert read_rtx_header(tmp_path / "newer").compute_capabilities == (86,)


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        read_rtx_header(path)
    assert caught.value.exit_code == 6
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 3, HEADER_BYTES - 1])
def test_read_rtx_header_of_a_plan_cut_off_raises(engine_bundle: Path, tmp_path: Path, length: int) -> None:
    start = next((engine_bundle / "engines").iterdir()).read_bytes()[:length]
    (tmp_path / "cut").write_bytes(start)
    assert refused(tmp_path / "cut") == (
        f"{tmp_path / 'cut'}: expected a plan of TensorRT-RTX, found {length} bytes that begin with {start[:4]!r}; "
        f"build it again"
    )


@pytest.mark.parametrize("content", [b"ptrt" + bytes(60), b"VTRT" + bytes(60), b" vtrt" + bytes(60), b"{}" * 30])
def test_read_rtx_header_of_a_foreign_file_raises(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign").write_bytes(content)
    assert f"{HEADER_BYTES} bytes that begin with {content[:4]!r}; build it again" in refused(tmp_path / "foreign")


def test_read_rtx_header_of_an_onnx_file_raises(graph: Path) -> None:
    assert refused(graph).startswith(f"{graph}: expected a plan of TensorRT-RTX, found {HEADER_BYTES} bytes")
