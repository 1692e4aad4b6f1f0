"""The library names that `sg_engines.trt` uses, checked in both libraries.

TensorRT takes gigabytes to install and needs an NVIDIA driver to import. Its bindings alone are a
small distribution, tensorrt-cu13-bindings. Their binary holds every name that Python sees as a C
string: the name, then a NUL byte. The byte before the name is not always NUL: if a string is the
end of another one, the linker stores it as a part of that one. So a name that is found may be only
the end of another name. A name that is not found is not in the library.
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
"""Names used with both libraries, by the class that has them; "" is the module."""

RTX_ALONE = {
    "": ("ComputeCapability", "IRuntimeCache"),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": ("SM75", "SM86", "SM120"),
}
"""Names used only if the library has them, or if a user asks for a TensorRT-RTX feature."""

DROPPED = (
    "platform_has_fast_int8",
    "set_dynamic_range",
    "int8_calibrator",
    "IAlgorithmSelector",
    "EXPLICIT_BATCH",
    "PREFER_PRECISION_CONSTRAINTS",
)
"""Names of TensorRT 10 that TensorRT 11 no longer has."""

LIBRARY_OBJECTS = {"trt", "builder", "network", "parser", "config", "profile", "cache", "e"}
"""Variables of `sg_engines.trt` that hold the library or one of its objects."""


def flat(names: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for own in names.values() for name in own]


def used_names() -> Iterator[str]:
    """Yield the library attributes that `sg_engines.trt` uses and the methods it overrides."""
    for node in ast.walk(ast.parse(inspect.getsource(sg_engines.trt))):
        if isinstance(node, ast.Attribute) and origin(node) in LIBRARY_OBJECTS:
            yield node.attr
        if isinstance(node, ast.ClassDef) and any(origin(base) in LIBRARY_OBJECTS for base in node.bases):
            methods = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
            yield from (name for name in methods if not name.startswith("_"))


def origin(node: ast.expr) -> str | None:
    """Return the variable at the start of a chain of attributes and calls."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else None


@pytest.fixture(scope="module")
def strings() -> bytes:
    """The bytes of the binary of TensorRT's bindings."""
    files = metadata.files("tensorrt-cu13-bindings") or []
    (binary,) = (file for file in files if file.name == "tensorrt.so")
    return Path(binary.locate()).read_bytes()


def has(strings: bytes, name: str) -> bool:
    return name.encode() + b"\0" in strings


def test_bindings_are_those_of_tensorrt_11() -> None:
    assert metadata.version("tensorrt-cu13-bindings").partition(".")[0] == "11"


def test_names_are_all_that_the_module_uses() -> None:
    """Python's own names, such as __name__, are left out."""
    found = {name for name in used_names() if not name.startswith("__")}
    assert found - set(flat(RTX_ALONE)) == set(flat(NAMES))


@pytest.mark.parametrize("name", flat(NAMES))
def test_used_name_is_in_tensorrt(strings: bytes, name: str) -> None:
    assert has(strings, name)


@pytest.mark.parametrize("name", flat(RTX_ALONE))
def test_name_of_rtx_alone_is_not_in_tensorrt(strings: bytes, name: str) -> None:
    """If TensorRT gains such a name, a test for the feature no longer identifies TensorRT-RTX."""
    assert not has(strings, name)


@pytest.mark.parametrize("name", DROPPED)
def test_dropped_name_is_not_in_tensorrt(strings: bytes, name: str) -> None:
    """This shows that the tests above can fail."""
    assert not has(strings, name)


@pytest.mark.parametrize("owner", sorted(NAMES.keys() | RTX_ALONE.keys()))
def test_used_names_are_in_tensorrt_rtx(owner: str) -> None:
    found: object = tensorrt_rtx
    for part in filter(None, owner.split(".")):
        found = getattr(found, part)
    for name in (*NAMES.get(owner, ()), *RTX_ALONE.get(owner, ())):
        assert hasattr(found, name)
