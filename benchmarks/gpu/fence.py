"""Runs a part in a process of its own, with a time limit. Whatever happens there is a finding."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu.child import EVENTS
from benchmarks.gpu.machine import ROOT, environment
from benchmarks.gpu.parts import Part
from benchmarks.gpu.results import Finding, Machine, Result, finding_of

LOOK = 0.1
"""Seconds between two looks at a process."""


def run_part(part: Part, machine: Machine, xl: Path, seconds: float, tell: Callable[[Finding], object]) -> Result:
    """Run all checks of a part and return what they found.

    A crash or an exit ends its check, and the part goes on with the next check in a new process.
    The time limit ends the part.
    seconds: time limit of the part. tell: called with each finding as it comes.
    """
    began, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    findings: list[Finding] = []

    def found(finding: Finding) -> None:
        findings.append(finding)
        tell(finding)

    complete, after = True, None
    with tempfile.TemporaryDirectory(prefix="sg-gpu-") as scratch:
        while True:
            child = _Child(part, Path(scratch), xl, after)
            with child.running() as process:
                while process.poll() is None and time.monotonic() - start < seconds:
                    for finding in child.read():
                        found(finding)
                    time.sleep(LOOK)
                code = process.poll()
            for finding in child.read():
                found(finding)
            if child.ended and code == 0:
                break
            complete = False
            end = f"was stopped after {seconds:g} s" if code is None else f"ended its process ({_exit(code)})"
            last = child.last_lines()
            said = ": ".join([end, *last[-1:]])
            found(Finding("", False, said, (), last, child.check or "start"))
            if code is None or child.ended or child.check is None:
                break
            after = child.check
    taken = round(time.monotonic() - start, 1)
    return Result(part.name, machine, began, taken, complete, tuple(findings))


@dataclass
class _Child:
    """A process that runs the checks of a part.

    check: name of the check that runs, None before the first.
    ended: whether all checks ended.
    """

    part: Part
    scratch: Path
    xl: Path
    after: str | None
    check: str | None = None
    ended: bool = False
    _read: int = field(default=0, init=False)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the process. At the end, kill it and all processes that it has started."""
        command = [sys.executable, "-m", "benchmarks.gpu.child", self.part.checks, str(self.scratch), str(self.xl)]
        command += [] if self.after is None else ["--after", self.after]
        (self.scratch / EVENTS).write_bytes(b"")
        with (self.scratch / "log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def read(self) -> list[Finding]:
        """Return the findings that came since the last call."""
        content = (self.scratch / EVENTS).read_bytes()[self._read :]
        lines = content[: content.rfind(b"\n") + 1]
        self._read += len(lines)
        found = []
        for event in map(json.loads, lines.splitlines()):
            if "check" in event:
                self.check = event["check"]
            elif "finding" in event:
                found.append(finding_of(event["finding"]))
            else:
                self.ended = True
        return found

    def last_lines(self) -> tuple[str, ...]:
        """Return the last lines that the process printed."""
        text = (self.scratch / "log").read_text(encoding="utf-8", errors="replace")
        return tuple(line[:300] for line in text.splitlines()[-12:])


def _exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
