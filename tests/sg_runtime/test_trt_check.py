"""Whether engines can run here, checked before any is opened. Damaged files: `tests/attacks`."""

import hashlib
import json
import shlex
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

import sg_runtime.backends.trt_check
from sg_export.cli import main
from sg_runtime.backends import choose_backend, open_backend
from sg_runtime.backends.ort import OrtBackend
from sg_runtime.backends.trt_check import check_engines, check_library, installed_version
from sg_runtime.bundle import Bundle
from sg_runtime.devices.gpus import Gpu
from sg_runtime.errors import BundleError, MissingExtraError, SgError, UsageError
from sg_runtime.pipeline import Pipeline

ADA, HOPPER, TURING = Gpu("NVIDIA GeForce RTX 4090", 89), Gpu("NVIDIA H100 80GB HBM3", 90), Gpu("NVIDIA T4", 75)
TARGETS = "80, 86, 89, 120, 121"


@pytest.fixture
def bundle(engine_bundle: Path) -> Bundle:
    return Bundle.open(engine_bundle)


@pytest.fixture
def version(bundle: Bundle) -> str:
    """Return the version of TensorRT-RTX that built the engines."""
    return bundle.manifest.engines[0].version


def engines(bundle: Bundle, **changes: Any) -> Bundle:
    """Return the bundle with replaced facts of its engines in the manifest."""
    manifest = bundle.manifest
    altered = tuple(replace(engine, **changes) for engine in manifest.engines)
    return Bundle(bundle.path, replace(manifest, engines=altered))


def refused(call: Callable[[], object], kind: type[SgError] = BundleError) -> str:
    """Return the message of the refusal, which must be one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def command(message: str) -> dict[str, Any]:
    """Return the option values of the `sg-export build` command at the end of a message."""
    words = shlex.split(message[message.index("sg-export build") :])
    context = main.commands["build"].make_context("build", words[2:], parent=click.Context(main))
    assert context.params["model"] == "tiny.safetensors"
    return context.params


def test_installed_version_is_the_librarys(version: str) -> None:
    assert installed_version("tensorrt_rtx") == version


def test_installed_version_of_a_library_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if it were not installed
    assert installed_version("tensorrt") is None


def test_installed_version_of_a_library_that_does_not_load_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library raises OSError, as if its shared libraries were missing."""
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')\n")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_version("tensorrt") is None


@pytest.mark.parametrize("number", [80, 86, 89, 120, 121])
def test_check_library_on_a_gpu_of_the_engines_passes(bundle: Bundle, version: str, number: int) -> None:
    check_library(bundle, "tensorrt_rtx", version, [Gpu("one", number), HOPPER])


def test_check_library_leaves_engines_of_another_library_alone(bundle: Bundle) -> None:
    check_library(bundle, "tensorrt", "0.0", [])


def test_check_library_of_another_version_names_both_and_the_build(bundle: Bundle, version: str) -> None:
    message = refused(lambda: check_library(bundle, "tensorrt_rtx", "1.6.0.1", [ADA]))
    file = bundle.manifest.engines[0].file
    assert message.startswith(
        f"{bundle.path}: {file}: expected TensorRT-RTX {version}, which built it, found 1.6.0.1; build it again: "
    )
    asked = command(message)
    assert (asked["target"], asked["output"]) == (("tensorrt-rtx",), bundle.path)
    assert asked["sm"] == (80, 86, 89, 120, 121)


def test_check_library_without_a_gpu_names_those_it_is_for_and_a_build_for_the_cpu(
    bundle: Bundle, version: str
) -> None:
    message = refused(lambda: check_library(bundle, "tensorrt_rtx", version, []))
    assert message.startswith(
        f"{bundle.path}: {bundle.manifest.engines[0].file}: expected a GPU of compute capability {TARGETS}, found "
        f"none; run it on such a machine, or build for the CPU: sg-export build "
    )
    assert command(message)["target"] == ("onnxruntime",)


def test_check_library_on_another_gpu_names_it_and_a_build_for_it(bundle: Bundle, version: str) -> None:
    message = refused(lambda: check_library(bundle, "tensorrt_rtx", version, [TURING, ADA]))
    assert message.startswith(
        f"{bundle.path}: {bundle.manifest.engines[0].file}: expected a GPU of compute capability {TARGETS}, found "
        f"NVIDIA T4 of 75; build it for this one: sg-export build "
    )
    asked = command(message)
    assert (asked["target"], asked["sm"]) == (("tensorrt-rtx",), (75,))


@pytest.mark.parametrize("number", [70, 90, 100])
def test_check_library_on_a_gpu_that_rtx_does_not_build_for_names_tensorrt(
    bundle: Bundle, version: str, number: int
) -> None:
    message = refused(lambda: check_library(bundle, "tensorrt_rtx", version, [Gpu("datacenter", number)]))
    assert f"found datacenter of {number}; build it for this one: " in message
    asked = command(message)
    assert (asked["target"], asked["sm"]) == (("tensorrt",), ())


def test_check_library_of_tensorrt_engines_on_another_gpu_builds_for_it(bundle: Bundle) -> None:
    """The header of TensorRT's plans is not known, so their files are not read."""
    built = engines(bundle, library="tensorrt", version="11.4", compute_capabilities=(90,))
    check_library(built, "tensorrt", "11.4", [HOPPER])
    message = refused(lambda: check_library(built, "tensorrt", "11.4", [ADA]))
    assert "expected a GPU of compute capability 90, found NVIDIA GeForce RTX 4090 of 89" in message
    asked = command(message)
    assert (asked["target"], asked["sm"]) == (("tensorrt",), ())
    assert "expected TensorRT 11.4, which built it, found 11.5" in refused(
        lambda: check_library(built, "tensorrt", "11.5", [HOPPER])
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": "1.7.0.0"}, "expected a plan of TensorRT-RTX 1.7.0.0 for (80, 86, 89, 120, 121), found one of "),
        ({"compute_capabilities": (75, 86)}, " for (75, 86), found one of "),
    ],
)
def test_check_library_of_a_manifest_that_says_another_thing_than_the_file_is_refused(
    bundle: Bundle, version: str, change: Any, expected: str
) -> None:
    """The check fails even if the manifest's values would fit this machine."""
    altered = engines(bundle, **change)
    message = refused(lambda: check_library(altered, "tensorrt_rtx", change.get("version", version), [Gpu("one", 86)]))
    assert expected in message
    assert f"found one of {version} for (80, 86, 89, 120, 121); build it again: " in message
    assert command(message)["target"] == ("tensorrt-rtx",)


def replaced(bundle: Bundle, folder: Path, content: Callable[[bytes], bytes]) -> Bundle:
    """Return a copy whose first engine was passed through a function.

    The manifest gets the new size and hash.
    """
    copy = Path(shutil.copytree(bundle.path, folder / "copy"))
    name = bundle.manifest.engines[0].file
    changed = content((copy / name).read_bytes())
    (copy / name).write_bytes(changed)
    facts = json.loads((copy / "manifest.json").read_bytes())
    facts["files"][name] = {"size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(facts))
    return Bundle.open(copy)


@pytest.mark.parametrize("content", [b"", b"vtrt", b"ptrt" + bytes(200), b"\x08\x0a" + bytes(200)])
def test_check_engines_of_a_foreign_file_in_the_engines_place_is_refused(
    bundle: Bundle, tmp_path: Path, content: bytes
) -> None:
    foreign = replaced(bundle, tmp_path, lambda engine: content)
    message = refused(lambda: check_engines(foreign, "tensorrt_rtx"))
    assert message.startswith(f"{foreign.path}/{bundle.manifest.engines[0].file}: expected a plan of TensorRT-RTX, ")
    assert message.endswith("build it again")


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (slice(24, 28), bytes([1, 6, 0, 9]), "found one of 1.6.0.9 for (80, 86, 89, 120, 121); build it again: "),
        (slice(32, 36), struct.pack("<I", 0b100), " for (86,); build it again: "),
    ],
    ids=["version", "targets"],
)
def test_check_engines_of_another_plan_in_the_engines_place_is_refused(
    bundle: Bundle, tmp_path: Path, place: slice, value: bytes, expected: str
) -> None:
    other = replaced(bundle, tmp_path, lambda engine: engine[: place.start] + value + engine[place.stop :])
    message = refused(lambda: check_engines(other, "tensorrt_rtx"))
    assert expected in message
    assert command(message)["output"] == other.path


@pytest.mark.parametrize(("library", "extra"), [("tensorrt_rtx", "tensorrt-rtx"), ("tensorrt", "tensorrt")])
def test_check_engines_without_the_library_names_the_extra(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, library: Any, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    built = engines(bundle, library=library)
    name = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[library]
    assert refused(lambda: check_engines(built, library), MissingExtraError) == (
        f"{bundle.path}: its engines need {name}, which is not installed: "
        f"pip install -e '.[{extra}]' in a checkout of sg-export"
    )
    assert MissingExtraError.exit_code == 2


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine appear without a GPU."""
    monkeypatch.setattr(sg_runtime.backends.trt_check, "find_gpus", lambda: ())


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine appear to have a GPU that the engines support."""
    monkeypatch.setattr(sg_runtime.backends.trt_check, "find_gpus", lambda: (ADA,))


@pytest.mark.usefixtures("no_gpu")
def test_load_without_a_gpu_names_those_it_is_for(engine_bundle: Path) -> None:
    message = refused(lambda: Pipeline.load(engine_bundle))
    assert f"expected a GPU of compute capability {TARGETS}, found none; run it on such a machine, or build" in message
    assert BundleError.exit_code == 6


def test_load_of_engines_for_another_batch_names_those_that_have_profiles(engine_bundle: Path) -> None:
    message = refused(lambda: Pipeline.load(engine_bundle, batch=3), UsageError)
    assert f"{engine_bundle}: batch: expected 1 (the engines' profiles), found 3; build it" in message
    assert command(message)["batch"] == (1, 3)


@pytest.mark.usefixtures("ada")
def test_choose_backend_of_engines_on_their_gpu_takes_their_library(bundle: Bundle) -> None:
    choice = choose_backend(bundle)
    assert (choice.name, choice.number, choice.rejected) == ("tensorrt-rtx", 0, ())


@pytest.mark.usefixtures("no_gpu")
def test_open_backend_of_engines_for_the_cpu_looks_for_no_gpu(bundle: Bundle) -> None:
    message = refused(lambda: open_backend(bundle, "cpu"))
    assert f"{bundle.path}: expected ONNX graphs, found engines alone, which run only on their target GPUs" in message
    assert command(message)["target"] == ("onnxruntime",)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_open_backend_of_graphs_in_bf16_names_the_precision(tiny_bundle: Path, device: str) -> None:
    opened = Bundle.open(tiny_bundle)
    bundle = Bundle(tiny_bundle, replace(opened.manifest, precision="bf16"))
    assert refused(lambda: open_backend(bundle, device)) == (
        f"{tiny_bundle}: its graphs are in BF16, which ONNX Runtime's CPU provider does not run; build it with "
        f"`precision` fp32, or for a GPU with `onnx_target` onnxruntime-cuda or `libraries` tensorrt_rtx"
    )


def test_onnx_of_engines_alone_names_what_leaves_the_graphs(bundle: Bundle) -> None:
    graph = bundle.manifest.hoisted("main")[0]
    expected = (
        f"{bundle.path}: expected ONNX graphs, found only engines; rebuild it with `keep_onnx`, or for ONNX Runtime"
    )
    assert refused(lambda: bundle.onnx(graph)) == expected
    assert refused(lambda: OrtBackend(bundle).lane().bind(graph, {}, {})) == expected


def test_onnx_of_a_graph_is_its_file(tiny_bundle: Path) -> None:
    opened = Bundle.open(tiny_bundle)
    assert opened.onnx(opened.manifest.hoisted("main")[0]) == tiny_bundle / "graphs/condition.onnx"
