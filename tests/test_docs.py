"""The commands of the pages in `docs` have the options that they use; those of guidance.md run, as do its programs."""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sg_export.cli import main

DOCS = Path(__file__).parent.parent / "docs"
GUIDANCE = (DOCS / "guidance.md").read_text(encoding="utf-8")

COMMAND = r"^ {4}(?:\$ )?sg-export (?:[^\n]*\\\n)*[^\n]*"
"""A command in a block of code, with the lines that it goes on in."""


def commands() -> list[tuple[str, str]]:
    """(page, command) of all that run sg-export."""
    pages = sorted(DOCS.glob("*.md"))
    return [
        (page.name, command)
        for page in pages
        for command in re.findall(COMMAND, page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def words(command: str) -> list[str]:
    """Arguments of a command."""
    return shlex.split(command.strip().removeprefix("$ ").replace("\\\n", ""))[1:]


@pytest.mark.parametrize(("page", "command"), commands())
def test_docs_command_parses(page: str, command: str) -> None:
    name, *arguments = words(command)
    main.commands[name].make_context(name, arguments, parent=click.Context(main))  # raises for a wrong option or value


@pytest.mark.slow
def test_guidance_page_run_from_top_to_bottom_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = list(re.finditer(rf"{COMMAND}|^```python\n(?P<program>[^`]*)```", GUIDANCE, re.MULTILINE))
    for match in found:
        if match["program"] is not None:
            exec(compile(match["program"], "guidance.md", "exec"), names)
            continue
        arguments = words(match[0])
        fewer = ["--count", "2"] if arguments[0] == "generate" else []
        result = CliRunner().invoke(main, arguments + fewer)
        refused = match[0].strip().startswith("$ ")
        assert result.exit_code == (2 if refused else 0), result.output
        if refused:
            assert GUIDANCE[match.end() :].splitlines()[1].strip() in result.output
    assert names["images"].shape == (1, 16, 16, 1)  # type: ignore[attr-defined]
