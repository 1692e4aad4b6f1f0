"""Files of results: written, read, and refused if damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.results import Figure, Finding, Result, ResultError, read, read_all, write


def test_read_of_a_written_result_is_that_result(result: Callable[..., Result], tmp_path: Path) -> None:
    write(result(), tmp_path / "card" / "driver.json")
    assert read(tmp_path / "card" / "driver.json") == result()
    assert read_all(tmp_path / "card") == {"driver": result()}
    assert [path.name for path in (tmp_path / "card").iterdir()] == ["driver.json"]


def test_figure_of_samples_is_their_median_and_quartiles() -> None:
    assert Figure.of("step", "ms", 4.0, 1.0, 3.0, 2.0, 5.0) == Figure("step", "ms", 3.0, 2.0, 4.0, 5)
    assert Figure.of("step", "ms", 1 / 3) == Figure("step", "ms", 0.33333, 0.33333, 0.33333, 1)


def test_ok_needs_a_complete_result_without_failures(result: Callable[..., Result]) -> None:
    assert result().ok
    assert not result(complete=False).ok
    failed = Finding("x", False, "why")
    assert not result(findings=(failed,)).ok
    assert result(findings=(failed, Finding("y", None))).failures == (failed,)


def drop(name: str) -> Callable[[Any], object]:
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("seconds"), "result: expected began, complete"),
        (lambda content: content.update(more=1), "found began, complete, findings, machine, more"),
        (lambda content: content.update(seconds="12"), "seconds: expected a number, found '12'"),
        (lambda content: content.update(seconds=True), "seconds: expected a number, found True"),
        (lambda content: content.update(complete=1), "complete: expected bool, found 1"),
        (lambda content: content.update(findings={}), "findings: expected a list"),
        (lambda content: content.update(machine=[]), r"machine: expected an object, found \[\]"),
        (lambda content: content["machine"].update(versions=[]), "versions: expected an object"),
        (lambda content: content["machine"]["versions"].update(torch=2), "versions.torch: expected str, found 2"),
        (lambda content: content["findings"][0].update(passed="yes"), "passed: expected true, false or null"),
        (lambda content: content["findings"][0].update(details=[1]), "details: expected str, found 1"),
        (lambda content: content["findings"][0]["figures"][0].update(samples=1.5), "samples: expected int, found 1.5"),
        (lambda content: content["findings"][0]["figures"][0].pop("unit"), "figure: expected high, low"),
    ],
)
def test_read_of_a_changed_file_names_it_and_what_is_wrong(
    result: Callable[..., Result], tmp_path: Path, change: Callable[[Any], object], said: str
) -> None:
    path = tmp_path / "driver.json"
    write(result(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=rf"driver.json: expected a result of benchmarks.gpu: .*{said}.*delete it"):
        read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_read_of_a_file_that_is_no_result_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "driver.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultError, match="delete it and run the part"):
        read(tmp_path / "driver.json")


def test_read_all_refuses_a_file_with_the_name_of_another_part(result: Callable[..., Result], tmp_path: Path) -> None:
    write(result(), tmp_path / "speed.json")
    with pytest.raises(ResultError, match="expected the part speed, found driver"):
        read_all(tmp_path)
