"""Builds, verifies and samples `glyphs` with the lowest versions that pyproject.toml claims.

    python -m benchmarks.lower_bounds                       all bounds of this interpreter, together
    python -m benchmarks.lower_bounds onnxscript==0.6.0     the same with another version of one
    python -m benchmarks.lower_bounds --output benchmarks/results/lower_bounds.json

The versions are installed into a temporary folder in front of this environment, with pip and its
index. PyTorch stays as it is installed. Exit code 1 if a command fails. Needs Python 3.11.

Below the bounds, click 8.3.3 cannot be imported by the command line, and onnx-ir 0.1.9 with
onnxscript 0.5.0 fails in PyTorch's exporter (PyTorch 2.13.0).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomllib

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("export", "ort", "verify")
COMMANDS = (
    "--help",
    "build glyphs --sparsity 0.5 -q --force -o fp32",
    "build glyphs --sparsity 0.5 -q --force -o fp16 --precision fp16",
    "build glyphs --sparsity 0.5 -q --force -o int8 --precision int8 --calib-samples 2",
    "verify fp32 -q",
    "verify fp16 -q",
    "verify int8 -q",
    "generate fp32 --count 4 -o grid.png",
    "generate fp16 --count 4 -o fp16.png",
    "inspect glyphs",
    "inspect fp16",
    "inspect int8",
)
"""Commands that use every library of EXTRAS."""


def lowest() -> dict[str, str]:
    """Return the lowest version of every library that the product and EXTRAS claim, but torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claims = [*project["dependencies"], *(c for extra in EXTRAS for c in project["optional-dependencies"][extra])]
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(claims), re.MULTILINE))
    del bounds["torch"]
    return bounds


def main() -> int:
    """Install the versions, run the commands, and print how each ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", nargs="*", metavar="NAME==VERSION")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    versions = lowest() | dict(other.split("==") for other in options.others)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        libraries = Path(scratch) / "libraries"
        wanted = [f"{name}=={version}" for name, version in versions.items()]
        print("with", ", ".join(wanted), flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(libraries)]
        subprocess.run([*pip, *wanted], check=True)
        rooms = (ROOT / room for room in ("", "engines", "runtime", "calibration"))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (libraries, *rooms)))}
        for command in COMMANDS:
            began = time.perf_counter()
            run = [sys.executable, "-m", "sg_export", *command.split()]
            ended = subprocess.run(run, cwd=scratch, env=environment, capture_output=True, text=True)
            told = ended.stderr.strip().splitlines()[-1:] if ended.returncode else []
            rows.append({"command": command, "exit_code": ended.returncode, "message": " ".join(told)})
            seconds = time.perf_counter() - began
            print(f"  {ended.returncode} after {seconds:.0f} s: sg-export {command}", *told, flush=True)
    if options.output:
        facts = {"setup": machine("torch"), "versions": versions, "commands": rows}
        options.output.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(row["exit_code"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
