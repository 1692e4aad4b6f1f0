"""Types of option values."""

import math
from typing import Any

import click
import pytest

from sg_export.cli.types import ImageSizeType, RampType, RouteType
from sg_runtime.manifest import Route


def test_route_type_reads_text_and_leaves_routes() -> None:
    kind = RouteType()
    assert kind.convert("2-24", None, None) == Route(2, 24)
    assert kind.convert(Route(1, 2), None, None) == Route(1, 2)


@pytest.mark.parametrize("value", ["512x768", "512X768", "512×768", (512, 768)])
def test_image_size_type_reads_height_and_width(value: Any) -> None:
    assert ImageSizeType().convert(value, None, None) == (512, 768)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2.0),
        ("-1.5", -1.5),
        ("3:1.5", (3.0, 1.5)),
        ("0:0.5", (0.0, 0.5)),
        (" 2 : 1 ", (2.0, 1.0)),
        ("inf", math.inf),
    ],
)
def test_ramp_type_reads_one_number_or_two(text: str, value: Any) -> None:
    assert RampType().convert(text, None, None) == value


@pytest.mark.parametrize("text", ["", "x", "1:2:3", "1:", ":1", ":", "1,2", "1-2"])
def test_ramp_type_of_other_text_says_how(text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        RampType().convert(text, None, None)
    assert caught.value.message == f"{text!r}: expected a number, or two as FIRST:LAST"


@pytest.mark.parametrize("value", [2.0, (3.0, 1.5)])
def test_ramp_type_leaves_what_is_read(value: Any) -> None:
    assert RampType().convert(value, None, None) == value
