"""The README's programs run as they stand there, and its commands have the options that they use."""

import re
import shlex
from pathlib import Path

import click
import pytest

from sg_export.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_readme_python_blocks_run_in_order(
    glyphs_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "glyphs-bundle").symlink_to(glyphs_bundle)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) == 3
    assert names["images"].shape == (2, 16, 16, 1)  # type: ignore[attr-defined]


def commands() -> list[str]:
    """Every line of the README that runs sg-export."""
    return [line.strip() for line in README.splitlines() if re.match(r"^ {4}(\.venv/bin/)?sg-export ", line)]


@pytest.mark.parametrize("line", commands())
def test_readme_command_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    command = main.commands[words[0]]
    command.make_context(words[0], words[1:], parent=click.Context(main))  # raises for an unknown option or a bad value
