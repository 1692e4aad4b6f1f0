"""The page of a card."""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.gpu.page import folder_name, render
from benchmarks.gpu.results import Finding, Result


def test_folder_name_is_the_card_in_small_letters() -> None:
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert folder_name("Orin (nvgpu)/../x") == "orin-nvgpu-x"


def test_render_shows_figures_with_units_and_spread(result: Callable[..., Result]) -> None:
    text = render({"driver": result()})
    assert text.startswith("# A Card 80GB\n")
    assert "| driver | passed | 2 of 2 | 12 | 2026-11-26T19:00:00+00:00 | abc1234 |" in text
    assert "driver 580.1, python " in text
    assert "torch 2.11.0+cu130" in text
    table = text[text.index("### timed") : text.index("### said")].splitlines()
    assert table[2:6] == [
        "| setting | step, ms | kernels | result |",
        "| --- | --- | --- | --- |",
        "| batch 1 | 2 (1.5–3) |  | passed |",
        "| batch 4 |  | 1300 |  |",
    ]
    assert "| passed | a \\| b |" in text


def test_render_names_failures_and_parts_that_are_not_complete(result: Callable[..., Result]) -> None:
    failed = result(findings=(Finding("batch 1", False, "one\nreason", check="a_check"),))
    crashed = replace(result(part="speed", complete=False), machine=replace(result().machine, driver="581"))
    text = render({"speed": crashed, "driver": failed})
    assert "| driver | **failed** | 0 of 1 |" in text
    assert "* a check (batch 1): one reason" in text
    assert "| speed | **not complete** | 2 of 2 |" in text
    assert text.index("## driver") < text.index("## speed")
    assert text.index("* driver: driver 580.1") < text.index("* speed: driver 581")
