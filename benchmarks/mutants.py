"""Check that the tests fail if a central line of the code is wrong.

    python -m benchmarks.mutants --output benchmarks/results/mutants.json

There are twelve mutants, each with the tests that should fail. A mutant is applied to a copy of
this checkout. It is caught if its tests fail with it and pass without it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = (".", "engines", "runtime", "calibration")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong line of code.

    file: file to change.
    line: correct text, which occurs once in the file.
    instead: wrong text that replaces it.
    tests: arguments of pytest that select the tests.
    """

    file: str
    line: str
    instead: str
    tests: str


MUTANTS = (
    Mutant(
        "sg_export/models/sparse.py",
        "return weak + scale * (strong - weak)",
        "return strong + scale * (weak - strong)",
        "tests/sg_export/models",
    ),
    Mutant(
        "sg_export/models/sparse.py",
        "subset.put_back(before if mask is None else mask, routed)",
        "subset.put_back(before, routed)",
        "tests/sg_export/test_maskdit_upstream.py",
    ),
    Mutant(
        "sg_export/models/branches.py",
        "packed[:, end - branch.count : end]",
        "packed[:, : branch.count]",
        "tests/sg_export/models",
    ),
    Mutant(
        "sg_export/graph/stamp.py",
        "for end in (place.start, place.stop))",
        "for end in (0, place.stop - place.start))",
        "tests/sg_export/graph/test_stamp.py -k names",
    ),
    Mutant(
        "sg_export/graph/stamp.py",
        "own = _renamed(name, renamed)",
        "own = name",
        "tests/sg_export/graph/test_stamp.py -k names",
    ),
    Mutant(
        "runtime/sg_runtime/guidance.py",
        "return weak + np.float32(scale) * (strong - weak)",
        "return strong + np.float32(scale) * (strong - weak)",
        "tests/sg_runtime/test_guidance.py",
    ),
    Mutant(
        "runtime/sg_runtime/sampling.py",
        "(1 / time, -1 / time)",
        "(-1 / time, 1 / time)",
        "tests/sg_runtime/test_sampling.py",
    ),
    Mutant(
        "runtime/sg_runtime/philox.py",
        "np.sort(np.argsort(words, kind=\"stable\")[:keep])",
        "np.argsort(words, kind=\"stable\")[:keep]",
        "tests/sg_runtime/test_philox.py",
    ),
    Mutant(
        "sg_export/quantize/gates.py",
        "min(q.strong, q.weak) >= least and",
        "max(q.strong, q.weak) >= least and",
        "tests/sg_export/quantize/test_gates.py",
    ),
    Mutant(
        "sg_export/graph/attention.py",
        "float(size) ** -0.5",
        "float(size) ** -1.0",
        "tests/sg_export/graph/test_trace_packed.py",
    ),
    Mutant(
        "runtime/sg_runtime/run/launches.py",
        "owner = next(k for k, other in enumerate(run.branches) if other.held[name] is branch.held[name])",
        "owner = 0",
        "tests/sg_runtime/run/test_launches.py",
    ),
    Mutant(
        "engines/sg_engines/child.py",
        "self._child.kill()",
        "pass",
        "tests/sg_engines/test_child.py -k says_nothing",
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "demo", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutant in MUTANTS:
            path = copy / mutant.file
            text = path.read_text()
            if text.count(mutant.line) != 1:
                raise SystemExit(
                    f"{mutant.file}: expected once, found {text.count(mutant.line)} times: {mutant.line}; edit MUTANTS"
                )
            before = passes(copy, mutant.tests)
            path.write_text(text.replace(mutant.line, mutant.instead))
            caught = before and not passes(copy, mutant.tests)
            path.write_text(text)
            rows.append({**asdict(mutant), "caught": caught})
            print(f"{'caught' if caught else 'MISSED'}  {mutant.file}: {mutant.line}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    if not all(row["caught"] for row in rows):
        raise SystemExit(1)


def passes(folder: Path, tests: str) -> bool:
    """Return whether the tests pass in the checkout `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder / room) for room in ROOMS)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=600).returncode == 0


if __name__ == "__main__":
    main()
