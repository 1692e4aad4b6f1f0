"""Options of a build."""

import re
from pathlib import Path
from typing import Any

import pytest

from sg_export.options.compile import CompileOptions
from sg_runtime.errors import UsageError


@pytest.mark.parametrize("opset", [19, 23])
def test_compile_options_of_another_opset_raise(opset: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"opset: expected 20 to 22, found {opset}"):
        CompileOptions(tmp_path, opset=opset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, found 0"),
        ({"steps": -3}, "steps: expected at least 1, found -3"),
        ({"strong_sparsity": ()}, "strong_sparsity: expected at least one, found none"),
        ({"guidance": "cfg", "sparsity": (0.5,)}, "sparsity: cfg guidance has no sparser branch: give strong_sparsity"),
        ({"guidance": "none", "sparsity": (0.5,)}, "sparsity: none guidance has no sparser branch"),
        ({"schedule": "linear"}, "schedule: expected one of constant, cosine, found 'linear'"),
        (
            {"guidance": "autoguidance"},
            "weak_checkpoint: expected one for autoguidance and for no other mode, found none",
        ),
        *(
            (
                {"guidance": mode, "weak_checkpoint": "weak.pt"},
                f"for no other mode, found weak.pt for {re.escape(mode)}$",
            )
            for mode in ("none", "cfg", "sg", "cfg+sg")
        ),
    ],
)
def test_compile_options_out_of_range_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompileOptions(Path("out"), **options)


@pytest.mark.parametrize(
    ("options", "mode"),
    [({}, "sg"), ({"guidance": "cfg"}, "cfg"), ({"weak_checkpoint": "weak.pt"}, "autoguidance")],
)
def test_compile_options_without_guidance_imply_it(options: dict[str, Any], mode: str) -> None:
    assert CompileOptions(Path("out"), **options).mode == mode
