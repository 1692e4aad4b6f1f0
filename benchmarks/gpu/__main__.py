r"""Check this project on an NVIDIA GPU, part by part.

    python -m benchmarks.gpu                      # the default parts, together within five minutes
    python -m benchmarks.gpu --dry-run            # what would run here, and what is missing
    python -m benchmarks.gpu speed eager          # these parts
    python -m benchmarks.gpu build-xl --xl DIR    # on a machine without a GPU, beforehand

Each part runs in a process of its own. It leaves RESULTS/CARD/PART.json, and RESULTS/CARD/README.md
shows all parts of the card. A part that has a complete result for this card, driver, code and these
library versions is not run again. The exit code is 0 if all checks passed, 5 if one failed or did
not run, 6 if there is no GPU or a file of results is damaged.

parts:
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import bundles, fence, page, parts, results
from benchmarks.gpu.machine import ROOT, Found, code, find
from benchmarks.gpu.results import Finding, Machine, Result

FAILED, NO_DEVICE, INTERRUPTED = 5, 6, 130
"""Exit codes, as in `sg_runtime.errors`."""

RESULTS = ROOT / "benchmarks/results/gpu"


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asks for.

    parts: names of parts; empty for the default parts.
    xl: folder of the bundles of DiT-XL/2.
    results: folder of the results of all cards.
    fresh: whether to run parts again that have a complete result.
    commit: commit of a copy without a repository; None asks git.
    """

    parts: list[str]
    xl: Path
    results: Path
    fresh: bool
    commit: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    listed = (f"  {part.name:13}{'' if part.default else '(by name) '}{part.says}" for part in parts.PARTS.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "") + "\n".join(listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run (default: those that need no name)")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and what is missing here; run nothing")
    parser.add_argument("--fresh", action="store_true", help="run parts again that have a complete result")
    parser.add_argument(
        "--xl",
        type=Path,
        default=bundles.xl_folder(),
        help="folder of the XL bundles (default: $SG_XL, or %(default)s)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all results (default: %(default)s)")
    parser.add_argument("--commit", help="commit of this code, if it is a copy without a repository")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.parts if name not in parts.PARTS]:
        parser.error(f"PART: expected some of {', '.join(parts.PARTS)}, found {', '.join(unknown)}")
    command = Command(given.parts, given.xl.absolute(), given.results, given.fresh, given.commit)
    try:
        found = find()
        return dry_run(command, found) if given.dry_run else run(command, found)
    except (RuntimeError, results.ResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_DEVICE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def dry_run(command: Command, found: Found) -> int:
    """Print each part with its time limit, what it needs, and what is missing here."""
    selected = parts.chosen(command.parts, command.xl)
    for part in selected:
        print(f"{part.name}: at most {part.seconds} s; needs {parts.needs(part)}")
        lacks = parts.missing(part, found)
        if part.xl and (reason := bundles.xl_missing(command.xl)):
            lacks.append(f"the XL bundles ({reason}); build-xl runs before")
        for lack in lacks:
            print(f"    missing: {lack}")
    if not command.parts:
        print(f"all together: at most {parts.LIMIT} s")
    print(f"GPU: {found.card or 'none'}; driver {found.driver}")
    print(f"XL bundles: {command.xl}")
    print(f"page: {command.results / (page.folder_name(found.card) or 'CARD') / 'README.md'}")
    return 0


def run(command: Command, found: Found) -> int:
    """Run the parts and write their results and the page. Return the exit code."""
    selected = parts.chosen(command.parts, command.xl)
    reason = parts.no_gpu(found)
    if reason and any(part.gpu for part in selected):
        raise RuntimeError(f"no GPU to check: missing {reason}; --dry-run lists what else is missing")
    machine = Machine(found.card, found.driver, found.measured, *code(commit=command.commit))
    folder = command.results / page.folder_name(found.card)
    known = results.read_all(folder) if found.card else {}
    end = time.monotonic() + (sum(part.seconds for part in selected) if command.parts else parts.LIMIT)
    ok = True
    for part in selected:
        earlier = known.get(part.name)
        if earlier is not None and earlier.complete and earlier.machine == machine and not command.fresh:
            print(f"{part.name}: has a complete result of {earlier.began}; --fresh runs it again")
            ok &= earlier.ok
            continue
        lacks = parts.missing(part, found)
        if part.xl and (reason := bundles.xl_missing(command.xl)):
            lacks.append(reason)
        if lacks:
            print(f"{part.name}: not run: missing {'; '.join(lacks)}")
            ok = False
            continue
        seconds = min(part.seconds, end - time.monotonic())
        if seconds < 1:
            print(f"{part.name}: not run: the {parts.LIMIT} s are over; the same command goes on here")
            ok = False
            continue
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        result = fence.run_part(part, machine, command.xl, seconds, show)
        print(f"{part.name}: {'passed' if result.ok else 'FAILED'} in {result.seconds:g} s", flush=True)
        ok &= result.ok
        if part.gpu:
            known[part.name] = result
            results.write(result, folder / f"{part.name}.json")
            write_page(known, folder)
    if known:
        print(f"page: {write_page(known, folder)}")
    else:
        print(f"XL bundles: {bundles.xl_missing(command.xl) or command.xl}")
    return 0 if ok else FAILED


def write_page(known: dict[str, Result], folder: Path) -> Path:
    """Write the page of a card and return its path."""
    (folder / "README.md").write_text(page.render(known), encoding="utf-8")
    return folder / "README.md"


def show(finding: Finding) -> None:
    """Print a finding in one line."""
    mark = {None: " ", True: "+", False: "!"}[finding.passed]
    figures = (f"{figure.name} {figure.median:.4g} {figure.unit}".strip() for figure in finding.figures)
    words = filter(None, (finding.check, finding.setting, ", ".join(figures), finding.said))
    print(f"  {mark} {': '.join(words)}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the process of the part as well
    sys.exit(main())
