"""Files that two journeys enter, and the number of files that spell out a fact.

    PYTHONPATH=TREE:TREE/engines:TREE/runtime:TREE/calibration python benchmarks/walks.py TREE

The journeys are those of a checkpoint to an engine and of a class and a seed to pixels. A door is a
pair of files of which the first calls into the second. The facts are searched as patterns in the
sources. TREE may be an earlier revision. benchmarks/results/walks.json has the output before and
after the redesign (revisions fa5648f and later).
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

FACTS = {
    "latent is a square": r"image_size, (?:\w+\.)*image_size|image_size\*\*2",
    "names of inputs that branches give": r"\"(?:keep_strong|keep_weak|modulations_weak)\"",
    "guidance modes by name": r"(?:==|!=|in) \(?\"(?:none|cfg|sg|autoguidance)\"",
    "number per type": r"\"(?:fp16|int8)\": (?!frozenset)[\w(\[{]",
    "a x + b D + e r": r"a \* x \+ b \* |float32\(value\) for value in \(",
    "spelling of an engine library": r"replace\(\"_\", \"-\"\)|\"tensorrt(?:_|-)rtx\": \"tensorrt(?:-|_)rtx\"",
    "extra that installs a library": r"\"(?:onnxruntime|onnx|polygraphy)\"[:,] .*\"(?:ort|export|verify)\"|, \"ort\"\)",
}
ROOMS = ("sg_export", "engines/sg_engines", "runtime/sg_runtime", "calibration/sg_calibration")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    tree = parser.parse_args().tree.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = {
            "checkpoint to engine": walked(tree, lambda: build(folder / "engines", "--target", "tensorrt-rtx")),
            "class and seed to pixels": sampled(tree, folder / "graphs"),
            "files that spell out": {fact: homes(tree, pattern) for fact, pattern in FACTS.items()},
        }
    print(json.dumps(result, indent=1))


def build(output: Path, *words: str) -> None:
    """Build the reference model."""
    from click.testing import CliRunner

    from sg_export.cli import main as command

    done = CliRunner().invoke(command, ["build", "--sparsity", "0.5", "-q", "-o", str(output), *words])
    assert done.exit_code == 0, done.output


def sampled(tree: Path, output: Path) -> dict[str, int]:
    """Follow one image through a pipeline that is warm."""
    from sg_runtime import Pipeline

    build(output)
    pipe = Pipeline.load(output)
    pipe([0], [0], steps=2)
    return walked(tree, lambda: pipe([0], [0], steps=2))


def walked(tree: Path, journey: Callable[[], Any]) -> dict[str, int]:
    """Count the files of the project that a journey enters, and the doors between them."""
    stays: list[str] = []
    with _entering(tree, stays):
        journey()
    return {"files": len({*stays}), "doors": len({*pairwise(stays)})}


@contextmanager
def _entering(tree: Path, stays: list[str]) -> Iterator[None]:
    """Append every file of the project that a call enters, if it is not the one before."""
    prefixes = tuple(str(tree / room) for room in ROOMS)

    def enter(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(prefixes) and (not stays or stays[-1] != file):
            stays.append(file)

    sys.setprofile(enter)
    try:
        yield
    finally:
        sys.setprofile(None)


def homes(tree: Path, pattern: str) -> int:
    """Count the source files in which a pattern occurs."""
    files = [file for room in ROOMS for file in (tree / room).rglob("*.py")]
    return sum(re.search(pattern, file.read_text(encoding="utf-8")) is not None for file in files)


if __name__ == "__main__":
    main()
