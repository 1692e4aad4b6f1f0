"""Check that the guidance, production and text-to-image pages run."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prx_folders import CONFIG, state_of, write_pipeline

from sg_export.cli import main

DOCS = Path(__file__).parent.parent / "docs"

COMMAND = r"^ {4}(?:\$ )?sg-export (?:[^\n]*\\\n)*[^\n]*"
"""Regular expression of a command in a code block, with its continuation lines."""


def words(command: str) -> list[str]:
    """Return the arguments of a command."""
    return shlex.split(command.strip().removeprefix("$ ").replace("\\\n", ""))[1:]


def run(page: str) -> dict[str, Any]:
    """Run the commands and programs of a page in order, in the current folder.

    Returns the variables of the programs.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for match in re.finditer(rf"{COMMAND}|^```python\n(?P<program>[^`]*)```", text, re.MULTILINE):
        if match["program"] is not None:
            exec(compile(match["program"], page, "exec"), names)
            continue
        arguments = words(match[0])
        fewer = ["--count", "2"] if arguments[0] == "generate" else []
        result = CliRunner().invoke(main, arguments + fewer)
        refused = match[0].strip().startswith("$ ")
        assert result.exit_code == (2 if refused else 0), result.output
        if refused:
            assert text[match.end() :].splitlines()[1].strip() in result.output
    return names


@pytest.mark.slow
def test_guidance_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("guidance.md")["images"].shape == (1, 16, 16, 1)


@pytest.mark.slow
def test_production_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("production.md")
    assert capsys.readouterr().out == "(2, 16, 16, 1)\n(1, 16, 16, 1)\n(4, 16, 16, 1)\n"
    assert names["latents"].shape == names["velocity"].shape == (2, 1, 16, 16)


@pytest.mark.slow
def test_text_to_image_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's folder `prx` is a tiny one, as `save_pretrained` of diffusers writes it."""
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, width=64, mlp_width=80)
    write_pipeline(tmp_path / "prx", config, state_of(config))
    names = run("text-to-image.md")
    assert capsys.readouterr().out == "(2, 32, 4, 6)\n(2, 32, 3, 2)\n"
    assert names["both"].weak is not None


def test_production_page_has_a_program_of_at_most_20_lines() -> None:
    programs = re.findall(r"^```python\n([^`]*)```", (DOCS / "production.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len([line for line in programs[0].splitlines() if line.strip()]) <= 20
