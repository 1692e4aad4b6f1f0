"""Runs the checks of a part in this process: `python -m benchmarks.gpu.child CHECKS SCRATCH XL`.

`fence` starts it. Each event is one line of JSON in SCRATCH/events.jsonl, so that findings outlive
a crash: {"check": NAME} before a check, {"finding": …} for each finding, {"end": true} at the end.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.results import Finding

EVENTS = "events.jsonl"


@dataclass(frozen=True, slots=True)
class Context:
    """What checks use.

    scratch: folder for files of this part.
    xl: folder of the bundles of DiT-XL/2.
    device, backend: where bundles run.
    """

    scratch: Path
    xl: Path
    device: str = "cuda"
    backend: str = "onnxruntime-cuda"


Check = Callable[[Context], Iterator[Finding]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", help="tuple of checks, as module:name")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("xl", type=Path)
    parser.add_argument("--after", help="start after the check of this name")
    options = parser.parse_args()
    module, _, name = options.checks.partition(":")
    checks: tuple[Check, ...] = getattr(import_module(module), name)
    if options.after is not None:
        names = [check.__name__ for check in checks]
        checks = checks[names.index(options.after) + 1 :]
    run(checks, Context(options.scratch, options.xl))


def run(checks: tuple[Check, ...], context: Context) -> None:
    """Run checks and write their events. An exception of a check is a finding."""
    with (context.scratch / EVENTS).open("a", encoding="utf-8", buffering=1) as stream:

        def say(event: dict[str, object]) -> None:
            stream.write(json.dumps(event) + "\n")

        for check in checks:
            say({"check": check.__name__})
            try:
                for finding in check(context):
                    say({"finding": asdict(replace(finding, check=check.__name__))})
            except Exception as error:  # a check may meet any error of any library
                where = tuple(traceback.format_exc().splitlines()[-12:])
                said = f"{type(error).__name__}: {error}"[:600]
                say({"finding": asdict(Finding(passed=False, said=said, details=where, check=check.__name__))})
        say({"end": True})


if __name__ == "__main__":
    main()
