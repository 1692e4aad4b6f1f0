"""Compare the test times of two pytest runs by file.

The times are from the JUnit files of both runs.

python -m pytest … --junitxml=before.xml
python -m benchmarks.test_times before.xml after.xml --output benchmarks/results/test_times.json
"""

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    before, after = by_file(options.before), by_file(options.after)
    rows = {
        name: {"before": round(before[name], 1), "after": round(after[name], 1)}
        for name in sorted({*before, *after}, key=lambda name: -max(before[name], after[name]))
    }
    total = {"before": round(before.total(), 1), "after": round(after.total(), 1)}
    text = json.dumps({"seconds": total, "seconds_by_file": rows}, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def by_file(path: Path) -> "Counter[str]":
    """Return the seconds of each file's tests, including fixtures."""
    times: Counter[str] = Counter()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        times[f"{case.attrib['classname'].replace('.', '/')}.py"] += float(case.attrib["time"])  # type: ignore[assignment]
    return times


if __name__ == "__main__":
    main()
