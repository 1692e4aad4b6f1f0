"""Option helps that repeat a default: the text agrees with the constant."""

import re
from collections.abc import Mapping

import pytest

from sg_calibration.settings import LEAST_STRATA, FeedSettings
from sg_calibration.types import QUANTS
from sg_export.adapters import dit, prx_configs
from sg_export.cli import main
from sg_export.graph.opset import DEFAULT_OPSET, OPSETS
from sg_export.options.compile import DEFAULT_SPARSITY, CompileOptions
from sg_runtime.backends.rtx_header import RTX_TARGETS
from sg_runtime.build_command import USUAL_OPSET


def option(name: str, command: str = "build") -> Mapping[str, object]:
    """Return what click knows of an option."""
    (found,) = (parameter for parameter in main.commands[command].params if name in parameter.opts)
    return {"help": found.help, "default": found.default, "type": found.type}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("--sparsity", [f"{DEFAULT_SPARSITY:g} for sg"]),
        ("--gate-cosine", [f"{row.gates.cosine:g} for {name}" for name, row in QUANTS.items()]),
        ("--gate-guided", [f"{row.gates.guided:g} for {name}" for name, row in QUANTS.items()]),
        ("--steps", [f"{dit.STEPS}; {prx_configs.STEPS} for PRX"]),
        ("--text-tokens", [str(prx_configs.TEXT_TOKENS)]),
        ("--method", [f"{row.method} for {name}" for name, row in QUANTS.items()]),
        ("--sm", [", ".join(f"{number // 10}.{number % 10}" for number in RTX_TARGETS[1:])]),
    ],
)
def test_help_of_a_default_agrees_with_the_code(name: str, values: list[str]) -> None:
    text = re.sub(r"\s+", " ", str(option(name)["help"]))
    for value in values:
        assert value in text


@pytest.mark.parametrize("command", ["build", "calibrate"])
def test_defaults_of_calibration_runs_are_those_of_the_library(command: str) -> None:
    usual = FeedSettings()
    names = {"--calib-samples": usual.samples, "--calib-steps": usual.steps, "--calib-seed": usual.seed}
    for name, value in names.items():
        assert option(name, command)["default"] == value
    assert option("--calib-steps", command)["type"].min == LEAST_STRATA  # type: ignore[attr-defined]


def test_defaults_of_build_are_those_of_the_library() -> None:
    usual = CompileOptions("out")  # type: ignore[arg-type]
    assert option("--scale")["default"] == usual.scale
    assert option("--precision")["default"] == usual.precision
    assert option("--strong-sparsity")["default"] == usual.strong_sparsity
    assert option("--opset")["default"] == usual.opset == DEFAULT_OPSET == USUAL_OPSET
    assert (option("--opset")["type"].min, option("--opset")["type"].max) == (OPSETS[0], OPSETS[-1])  # type: ignore[attr-defined]
