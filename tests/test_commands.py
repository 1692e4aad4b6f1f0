"""Check that every command of sg-export in pages, helps, messages and the Makefile can be given."""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sg_export.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
SOURCES = [file for room in ("sg_export", "engines", "runtime", "calibration") for file in ROOT.glob(f"{room}/**/*.py")]

LINE = re.compile(r"^ {4,}(?:\$ )?(?:\.venv/bin/)?(sg-export (?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
"""A command on a line of its own, with its continuation lines."""

INLINE = re.compile(r"(?:`|(?:with|by|from|run|for|says|:) )sg-export ([a-z]+)([^`;,:)\n]*)")
"""A command in a sentence: its name, and perhaps its arguments."""


def commands() -> list[str]:
    """Return all commands on lines of their own, in pages, helps and the Makefile."""
    helps = [inspect.cleandoc(str(command.help)) for command in (main, *main.commands.values())]
    texts = [*(page.read_text(encoding="utf-8") for page in PAGES), *(re.sub("(?m)^", "  ", text) for text in helps)]
    found = [command for text in texts for command in LINE.findall(text)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found += [
        re.sub(r"\$\([^)]*\)|\$@", "x", line.replace("$*", "fp16"))
        for line in re.findall(r"\$\(BIN\)/(sg-export .*)", makefile)
    ]
    return list(dict.fromkeys(found))


def texts() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of each text of the sources, and of each page."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value
    for page in PAGES:
        yield str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")


def parse(command: str) -> None:
    """Parse a command. Raises click.UsageError for a wrong command, option or value."""
    name, *arguments = shlex.split(command.replace("\\\n", ""), comments=True)[1:]
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    main.commands[name].make_context(name, arguments, parent=click.Context(main))


@pytest.mark.parametrize("command", commands())
def test_command_on_a_line_of_its_own_parses(command: str) -> None:
    parse(command)


def test_commands_in_sentences_exist_with_their_options() -> None:
    found = []
    for place, text in texts():
        for name, rest in INLINE.findall(text):
            assert name in main.commands, f"{place}: sg-export {name}"
            known = {option for parameter in main.commands[name].params for option in parameter.opts} | {"--help"}
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", rest)) - known
            assert not unknown, f"{place}: sg-export {name}: {unknown}"
            found.append(name)
    assert {"build", "calibrate", "verify", "doctor"} <= set(found)


def test_options_in_pages_exist() -> None:
    options = [option for command in main.commands.values() for option in command.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        if page.name in ("decisions.md", "gpu.md"):  # old options, and those of `benchmarks.gpu`
            continue
        for option in re.findall(r"`(--[a-z][a-z-]*)", page.read_text(encoding="utf-8")):
            assert option in known | {"--help"}, f"{page.name}: {option}"
