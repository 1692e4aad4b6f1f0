"""The names that `sg_engines.trt` uses of the library, in both libraries.

TensorRT is gigabytes to install and needs an NVIDIA driver to import. Its bindings alone are a small distribution,
tensorrt-cu13-bindings, whose binary holds every name that Python sees as a C string: the name, then a NUL byte. What
stands before it is no NUL in general, because the linker keeps a string that another one ends with as a part of that.
So a name may seem to be there that is only the end of another; a name that is not found is not there.
"""

import ast
import inspect
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import tensorrt_rtx

import sg_engines.trt

NAMES: dict[str, tuple[str, ...]] = {
    "": ("Builder", "OnnxParser", "MemoryPoolType", "ILogger", "IProgressMonitor"),
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("node_name", "node_operator", "desc"),
    "IBuilderConfig": (
        "progress_monitor",
        "set_memory_pool_limit",
        "add_optimization_profile",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
    ),
    "MemoryPoolType": ("WORKSPACE",),
    "IOptimizationProfile": ("set_shape",),
    "ITimingCache": ("serialize",),
    "ILogger": ("Severity", "log"),
    "ILogger.Severity": ("ERROR", "INTERNAL_ERROR"),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
}
"""What is used, by the class that has it; "" for the module."""

RTX_ALONE = {
    "": ("ComputeCapability", "IRuntimeCache"),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": ("SM75", "SM86", "SM120"),
}
"""What is used where the library has it, or where a user asked for what only TensorRT-RTX can."""

DROPPED = (
    "platform_has_fast_int8",
    "set_dynamic_range",
    "int8_calibrator",
    "IAlgorithmSelector",
    "EXPLICIT_BATCH",
    "PREFER_PRECISION_CONSTRAINTS",
)
"""Names of TensorRT 10 that 11 has no more."""

LIBRARY_OBJECTS = {"trt", "builder", "network", "parser", "config", "profile", "cache", "e"}
"""Variables of `sg_engines.trt` that hold the library or something of it."""


def flat(names: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for own in names.values() for name in own]


def used_names() -> Iterator[str]:
    """Attributes of the library's objects in `sg_engines.trt`, and methods of the library's that it overrides."""
    for node in ast.walk(ast.parse(inspect.getsource(sg_engines.trt))):
        if isinstance(node, ast.Attribute) and origin(node) in LIBRARY_OBJECTS:
            yield node.attr
        if isinstance(node, ast.ClassDef) and any(origin(base) in LIBRARY_OBJECTS for base in node.bases):
            methods = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
            yield from (name for name in methods if not name.startswith("_"))


def origin(node: ast.expr) -> str | None:
    """The variable that a chain of attributes and calls begins with."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else None


@pytest.fixture(scope="module")
def strings() -> bytes:
    """The binary of TensorRT's bindings."""
    files = metadata.files("tensorrt-cu13-bindings") or []
    (binary,) = (file for file in files if file.name == "tensorrt.so")
    return Path(binary.locate()).read_bytes()


def has(strings: bytes, name: str) -> bool:
    return name.encode() + b"\0" in strings


def test_bindings_are_those_of_tensorrt_11() -> None:
    assert metadata.version("tensorrt-cu13-bindings").partition(".")[0] == "11"


def test_names_are_all_that_the_module_uses() -> None:
    """Python's own, such as __name__, are left out."""
    found = {name for name in used_names() if not name.startswith("__")}
    assert found - set(flat(RTX_ALONE)) == set(flat(NAMES))


@pytest.mark.parametrize("name", flat(NAMES))
def test_used_name_is_in_tensorrt(strings: bytes, name: str) -> None:
    assert has(strings, name)


@pytest.mark.parametrize("name", flat(RTX_ALONE))
def test_name_of_rtx_alone_is_not_in_tensorrt(strings: bytes, name: str) -> None:
    """As soon as it is, what is asked for by feature means something else."""
    assert not has(strings, name)


@pytest.mark.parametrize("name", DROPPED)
def test_dropped_name_is_not_in_tensorrt(strings: bytes, name: str) -> None:
    """So the tests above can fail."""
    assert not has(strings, name)


@pytest.mark.parametrize("owner", sorted(NAMES.keys() | RTX_ALONE.keys()))
def test_used_names_are_in_tensorrt_rtx(owner: str) -> None:
    found: object = tensorrt_rtx
    for part in filter(None, owner.split(".")):
        found = getattr(found, part)
    for name in (*NAMES.get(owner, ()), *RTX_ALONE.get(owner, ())):
        assert hasattr(found, name)
