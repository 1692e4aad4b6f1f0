"""Names and signatures that `sg_engines.trt` uses, checked in TensorRT 10 and 11 and in RTX.

TensorRT takes gigabytes to install and needs an NVIDIA driver to import. `trt_api.json` records the
API of its bindings.
"""

import shutil
from importlib import metadata
from pathlib import Path

import make_trt_api
import pytest
import tensorrt_rtx
from trt_api import api_of, misfits, missing, recorded, uses

import sg_engines.trt

NAMES: dict[str, tuple[str, ...]] = {
    "": (
        "Builder",
        "BuilderFlag",
        "NetworkDefinitionCreationFlag",
        "OnnxParser",
        "MemoryPoolType",
        "ILogger",
        "IProgressMonitor",
    ),
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("node_name", "node_operator", "desc"),
    "IBuilderConfig": (
        "progress_monitor",
        "set_flag",
        "clear_flag",
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
}
"""Names used only if the library has them, or if a user asks for a TensorRT-RTX feature."""

BY_NAME = {"BuilderFlag": ("TF32",)}
"""Names that the module reads by `getattr`."""

RTX_BY_NAME = {"BuilderFlag": ("REQUIRE_USER_ALLOCATION",), "ComputeCapability": ("SM75", "SM86", "SM120")}

DROPPED = {
    "Builder": ("platform_has_fast_int8",),
    "IBuilderConfig": ("int8_calibrator",),
    "BuilderFlag": ("FP16", "BF16", "PREFER_PRECISION_CONSTRAINTS"),
    "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",),
}
"""Names of TensorRT 10 that TensorRT 11 no longer has."""

OBJECTS = {"trt", "builder", "network", "parser", "config", "profile", "cache", "e"}
"""Variables of `sg_engines.trt` that hold the library or one of its objects."""

USES = {use for use in uses(sg_engines.trt, OBJECTS) if not use.name.startswith("__")}
"""What the module uses of the library, without Python's own names."""

VERSIONS = ["10.3.0", "10.16.1.11", "11.4.0.106"]


def test_recorded_versions_are_the_least_the_last_10_and_the_installed_11() -> None:
    assert sorted(recorded()) == sorted(VERSIONS)
    assert metadata.version("tensorrt-cu13-bindings") == VERSIONS[-1]
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '"tensorrt>=10.3"' in project.read_text()


@pytest.mark.skipif(not shutil.which("cc") or not shutil.which("readelf"), reason="needs a C compiler and readelf")
def test_record_of_the_installed_bindings_is_current() -> None:
    (binary,) = (file for file in metadata.files("tensorrt-cu13-bindings") or [] if file.name == "tensorrt.so")
    assert make_trt_api.read_apart(Path(binary.locate()).parents[1]) == recorded()[VERSIONS[-1]]


def test_names_are_all_that_the_module_uses() -> None:
    expected = {name for names in (NAMES, RTX_ALONE) for own in names.values() for name in own}
    assert {use.name for use in USES} | {"IRuntimeCache"} == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_used_names_are_in_tensorrt_and_take_the_arguments(version: str) -> None:
    api = recorded()[version]
    assert not missing(api, NAMES)
    assert not missing(api, BY_NAME)
    assert not misfits(api, NAMES, USES)


@pytest.mark.parametrize("version", VERSIONS)
def test_names_of_rtx_alone_are_not_in_tensorrt(version: str) -> None:
    """If TensorRT gains such a name, a test for the feature no longer identifies TensorRT-RTX."""
    for names in (RTX_ALONE, RTX_BY_NAME):
        assert len(missing(recorded()[version], names)) == sum(map(len, names.values()))


def test_dropped_names_are_in_tensorrt_10_alone() -> None:
    """This shows that the tests above can fail."""
    assert not missing(recorded()["10.3.0"], DROPPED)
    assert len(missing(recorded()[VERSIONS[-1]], DROPPED)) == sum(map(len, DROPPED.values()))


def test_network_flag_has_another_number_in_tensorrt_10() -> None:
    """So the module reads the number from the library."""
    numbers = {v: api["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"] for v, api in recorded().items()}
    assert numbers == {"10.3.0": 1, "10.16.1.11": 1, "11.4.0.106": 0}


def test_used_names_are_in_tensorrt_rtx_and_take_the_arguments() -> None:
    api = api_of(tensorrt_rtx)
    for names in (NAMES, RTX_ALONE, BY_NAME, RTX_BY_NAME):
        assert not missing(api, names)
        assert not misfits(api, names, USES)
