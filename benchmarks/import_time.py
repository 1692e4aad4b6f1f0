"""Measure which packages `import sg_runtime` and `sg-export --help` load, and how long both take.

    python -m benchmarks.import_time --output benchmarks/results/import_time.json

The time is the time of the entire process. In every round, each command runs in turn with an
interpreter that does nothing. The figures are medians and quartiles over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": "pass",
    "import numpy": "import numpy",
    "import sg_runtime": "import sg_runtime",
    "sg-export --help": "import sys; sys.argv = ['sg-export', '--help']; from sg_export.cli import main; "
    "main(standalone_mode=False)",
}
LIST_PACKAGES = (
    "; import sys; print('\\n' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules} "
    "- set(sys.stdlib_module_names))))"
)
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS + 1):
        for name, code in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
            times[name].append(time.perf_counter() - began)
    rows = {}
    for name, code in COMMANDS.items():
        low, median, high = statistics.quantiles(times[name][1:], n=4)  # the first round fills the disk cache
        command = [sys.executable, "-c", code + LIST_PACKAGES]
        listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        packages = [word for word in listing.stdout.splitlines()[-1].split() if not word.startswith("_")]
        quartiles = [round(low, 4), round(high, 4)]
        rows[name] = {"median_s": round(median, 4), "quartiles_s": quartiles, "packages": packages}
        print(f"{name:18} {median:.3f} s  ({low:.3f} to {high:.3f})  {' '.join(packages)}")
    if options.output:
        setup = {"python": platform.python_version(), "processors": os.cpu_count(), "rounds": ROUNDS}
        options.output.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
