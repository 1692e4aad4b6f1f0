"""Options of quantization."""

from pathlib import Path
from typing import Any

import pytest

from sg_calibration.types import QUANTS
from sg_export.options.quantize import QuantizeOptions
from sg_runtime.errors import UsageError
from sg_runtime.manifest import QualityGates

IMPOSSIBLE = QualityGates(1.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "largest"}, "method: expected one of min-max, percentile, entropy, found 'largest'"),
        ({"table": Path("a"), "data": Path("b")}, "`table` and `data`: expected one of them"),
        ({"type": "int4"}, "type: expected one of int8, fp8, found 'int4'"),
    ],
)
def test_quantize_options_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeOptions(**settings)


def test_quantize_options_have_defaults_by_type() -> None:
    assert (QuantizeOptions("fp8").effective_method, QuantizeOptions("fp8").effective_gates) == (
        "min-max",
        QUANTS["fp8"].gates,
    )
    assert QuantizeOptions("fp8", method="entropy", gates=IMPOSSIBLE).effective_gates == IMPOSSIBLE
