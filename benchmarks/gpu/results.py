"""Results of a part, and the JSON files that hold them."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class ResultError(Exception):
    """A file of results cannot be read. The message names it, what was expected, and the remedy."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured quantity.

    name: what was measured.
    unit: unit of the values; empty for a count or a ratio.
    median: median of the samples.
    low, high: quartiles of the samples; equal to the median if there is one sample.
    samples: number of samples.
    """

    name: str
    unit: str
    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, name: str, unit: str, *samples: float) -> "Figure":
        """Summarise at least one sample. The values are rounded to five digits."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if samples[1:] else samples * 3
        return cls(name, unit, _rounded(median), _rounded(low), _rounded(high), len(samples))


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found in one setting.

    setting: what distinguishes this finding from others of the check.
    passed: whether the criterion holds; None for a measurement without a criterion.
    said: what was found, in words. If passed is False, it is the reason.
    figures: what was measured.
    details: lines for readers of the JSON, such as the most expensive kernels.
    check: name of the check; whoever runs the check fills it in.
    """

    setting: str = ""
    passed: bool | None = None
    said: str = ""
    figures: tuple[Figure, ...] = ()
    details: tuple[str, ...] = ()
    check: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a result depends on. Results of equal machines need not be measured again.

    card: name of the GPU.
    driver: version of NVIDIA's driver.
    versions: versions of Python and of the libraries.
    commit: last commit that changed the code, with "+changes" if files differ from it.
    sources: SHA-256 of the code.
    """

    card: str
    driver: str
    versions: Mapping[str, str]
    commit: str
    sources: str


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a part.

    part: name of the part.
    machine: what it was measured with.
    began: time of its start, ISO 8601.
    seconds: time that it took.
    complete: whether all checks ended by themselves, passed or not.
    findings: what the checks found, in order.
    """

    part: str
    machine: Machine
    began: str
    seconds: float
    complete: bool
    findings: tuple[Finding, ...]

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Findings whose criterion does not hold."""
        return tuple(finding for finding in self.findings if finding.passed is False)

    @property
    def ok(self) -> bool:
        """Whether the part is complete and nothing failed."""
        return self.complete and not self.failures


def write(result: Result, path: Path) -> None:
    """Write a result as JSON, by a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> Result:
    """Read a result. Raises ResultError if the file is not one that `write` has written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _result(content)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: expected a result of benchmarks.gpu: {error}; delete it and run the part") from None


def read_all(folder: Path) -> dict[str, Result]:
    """Read all results in a folder, by part. Raises ResultError for a damaged one."""
    found = {path: read(path) for path in sorted(folder.glob("*.json"))}
    for path, result in found.items():
        if result.part != path.stem:
            raise ResultError(f"{path}: expected the part {path.stem}, found {result.part}: rename it")
    return {result.part: result for result in found.values()}


def finding_of(content: object) -> Finding:
    """Parse a finding. Raises ValueError if a key or a type is wrong."""
    given = _fields("finding", content, Finding)
    figures = [_figure(figure) for figure in _items("figures", given["figures"])]
    details = [_typed("details", line, str) for line in _items("details", given["details"])]
    passed = given["passed"]
    if passed is not None and not isinstance(passed, bool):
        raise ValueError(f"passed: expected true, false or null, found {passed!r}")
    texts = {name: _typed(name, given[name], str) for name in ("setting", "said", "check")}
    return Finding(passed=passed, figures=tuple(figures), details=tuple(details), **texts)


def _result(content: object) -> Result:
    given = _fields("result", content, Result)
    machine = _fields("machine", given["machine"], Machine)
    if not isinstance(machine["versions"], dict):
        raise ValueError(f"versions: expected an object, found {machine['versions']!r}")
    versions = {name: _typed(f"versions.{name}", value, str) for name, value in machine.pop("versions").items()}
    texts = {name: _typed(name, value, str) for name, value in machine.items()}
    return Result(
        part=_typed("part", given["part"], str),
        machine=Machine(versions=versions, **texts),
        began=_typed("began", given["began"], str),
        seconds=_number("seconds", given["seconds"]),
        complete=_typed("complete", given["complete"], bool),
        findings=tuple(finding_of(finding) for finding in _items("findings", given["findings"])),
    )


def _figure(content: object) -> Figure:
    given = _fields("figure", content, Figure)
    name, unit = (_typed(key, given[key], str) for key in ("name", "unit"))
    median, low, high = (_number(key, given[key]) for key in ("median", "low", "high"))
    return Figure(name, unit, median, low, high, _typed("samples", given["samples"], int))


def _fields(name: str, content: object, kind: Any) -> dict[str, Any]:
    """Return the values of an object that has exactly the fields of the dataclass `kind`."""
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected an object, found {content!r:.80}")
    wanted = set(kind.__dataclass_fields__)
    if set(content) != wanted:
        raise ValueError(f"{name}: expected {', '.join(sorted(wanted))}, found {', '.join(sorted(content)) or 'none'}")
    return dict(content)


def _items(name: str, value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, found {value!r:.80}")
    return value


def _typed(name: str, value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, found {value!r:.80}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, found {value!r:.80}")
    return value


def _rounded(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else value
