"""Gates of quantized bundles."""

from dataclasses import replace

from sg_export.quantize.gates import gates_hold
from sg_runtime.manifest import QualityGates, StratumQuality


def test_gates_hold_is_at_every_time_and_of_each_branch() -> None:
    good = StratumQuality(1.0, 0.99, 0.99, 0.1)
    gates = QualityGates(0.99, 0.1)
    assert gates_hold([good, good], gates)
    assert not gates_hold([good], gates, 0.9)
    for worse in ({"strong": 0.98}, {"weak": 0.98}, {"guided": 0.11}, {"guided": float("nan")}):
        assert not gates_hold([good, replace(good, **worse), good], gates)
