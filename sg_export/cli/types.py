"""Types of option values."""

import re
from typing import Any

import click

from sg_runtime.errors import UsageError
from sg_runtime.guidance import Ramp
from sg_runtime.manifest import PARTS, Part, Route


class RouteType(click.ParamType[Route]):
    """A route, START-END, both blocks included."""

    name = "START-END"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Route:
        if isinstance(value, Route):
            return value
        try:
            return Route.parse(value)
        except UsageError as error:
            self.fail(str(error), param, context)


class ImageSizeType(click.ParamType[tuple[int, int]]):
    """Height and width of a picture in pixels, HEIGHTxWIDTH."""

    name = "HEIGHTxWIDTH"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5})[x\N{MULTIPLICATION SIGN}](\d{1,5})", str(value), re.IGNORECASE)
        if match is None or 0 in (size := (int(match[1]), int(match[2]))):
            self.fail(f"{value!r}: expected HEIGHTxWIDTH in pixels, for example 512x768", param, context)
        return size


class ClassesType(click.ParamType[tuple[int | str, ...]]):
    """Classes, separated by commas: indices, ranges of indices FIRST-LAST, and names."""

    name = "LIST"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int | str, ...]:
        found: list[int | str] = []
        for part in str(value).split(","):
            if (ends := re.fullmatch(r"(\d{1,6})-(\d{1,6})", part.strip())) is not None:
                first, last = int(ends[1]), int(ends[2])
                if first > last:
                    self.fail(f"{part.strip()!r}: expected a range FIRST-LAST, found one that falls", param, context)
                found += range(first, last + 1)
            else:
                found.append(class_name(part.strip()))
        return tuple(found)


def class_name(text: str) -> int | str:
    """Return a class as the user names it: a number is an index."""
    return int(text) if re.fullmatch("-?[0-9]{1,9}", text) else text


class PartsType(click.ParamType[tuple[Part, ...]]):
    """Parts of a bundle, separated by commas."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[Part, ...]:
        named = dict.fromkeys(name.strip() for name in str(value).split(","))
        if "step" not in named or not named.keys() <= set(PARTS):
            self.fail(f"{value!r}: expected step, alone or with text and decode, as step,text,decode", param, context)
        return tuple(part for part in PARTS if part in named)


class CountRangeType(click.ParamType[tuple[int, int]]):
    """A number of replicas, or LEAST:MOST."""

    name = "NUMBER|LEAST:MOST"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            self.fail(f"{value!r}: expected a number of at least 1, or two as LEAST:MOST", param, context)
        return int(match[1]), int(match[2] or match[1])


class RampType(click.ParamType[Ramp]):
    """A number, or FIRST:LAST for a cosine from the first step's value to the last step's value."""

    name = "NUMBER|FIRST:LAST"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Ramp:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # a default
        try:
            numbers = tuple(float(part) for part in value.split(":"))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 2):
            self.fail(f"{value!r}: expected a number, or two as FIRST:LAST", param, context)
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


class ComputeCapabilityType(click.ParamType[int]):
    """A compute capability, 8.6 or 86."""

    name = "SM"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,2})\.?(\d)", str(value))
        if match is None:
            self.fail(f"{value!r}: expected a compute capability, for example 8.6 or 86", param, context)
        return int(match[1] + match[2])


class SizeType(click.ParamType[int]):
    """A size in bytes, with an optional unit: 512M or 4G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)([KMG]?)i?B?", str(value), re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r}: expected a size, for example 512M or 4G", param, context)
        return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]
