"""The page of a card, rendered from all its results."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.results import Figure, Finding, Result


def folder_name(card: str) -> str:
    """Return the name of a card's folder: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def render(results: Mapping[str, Result]) -> str:
    """Return the page as Markdown. results: at least one result of the same card, by part."""
    ordered = [results[name] for name in PARTS if name in results]
    lines = [f"# {ordered[0].machine.card}", "", *_summary(ordered)]
    for result in ordered:
        lines += ["", f"## {result.part}", "", PARTS[result.part].says, *_part(result)]
    return "\n".join(lines) + "\n"


def _summary(results: Sequence[Result]) -> Iterable[str]:
    yield "`python -m benchmarks.gpu` wrote this page from the JSON files next to it. A figure is a median,"
    yield "with quartiles in parentheses if it has several samples."
    yield ""
    rows = []
    for result in results:
        judged = [finding for finding in result.findings if finding.passed is not None]
        verdict = "passed" if result.ok else "**failed**"
        state = verdict if result.complete else "**not complete**"
        passed = f"{len(judged) - len(result.failures)} of {len(judged)}"
        rows.append([result.part, state, passed, f"{result.seconds:.0f}", result.began, result.machine.commit])
    yield from _table(("part", "result", "checks passed", "seconds", "began", "commit"), rows)
    yield ""
    for machine, group in groupby(results, key=lambda result: (result.machine.driver, result.machine.versions)):
        driver, versions = machine
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield f"* {', '.join(result.part for result in group)}: driver {driver}, {named}"


def _part(result: Result) -> Iterable[str]:
    if result.failures:
        yield from ("", "Failed:", "")
        for finding in result.failures:
            setting = f" ({finding.setting})" if finding.setting else ""
            yield f"* {_title(finding.check)}{setting}: {_cell(finding.said)}"
    for check, group in groupby(result.findings, key=lambda finding: finding.check):
        yield from ("", f"### {_title(check)}", "", *_check(list(group)))


def _check(findings: Sequence[Finding]) -> Iterable[str]:
    """Yield one table, a finding a row. Columns without content are left out."""
    names = dict.fromkeys((figure.name, figure.unit) for finding in findings for figure in finding.figures)
    header = ["setting", *(f"{name}, {unit}" if unit else name for name, unit in names), "result", "found"]
    rows = []
    for finding in findings:
        by_name = {(figure.name, figure.unit): figure for figure in finding.figures}
        verdict = {None: "", True: "passed", False: "**failed**"}[finding.passed]
        figures = [_figure(by_name[name]) if name in by_name else "" for name in names]
        rows.append([_cell(finding.setting), *figures, verdict, _cell(finding.said)])
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return _table([header[column] for column in used], [[row[column] for column in used] for row in rows])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _figure(figure: Figure) -> str:
    spread = f" ({figure.low:.4g}–{figure.high:.4g})" if figure.samples > 1 else ""
    return f"{figure.median:.4g}{spread}"


def _title(check: str) -> str:
    return check.replace("_", " ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
