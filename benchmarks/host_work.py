"""Time what the CPU does in a sampling run besides the graphs: prepare, fill tables, launch.

    python -m benchmarks.host_work --output benchmarks/results/host_work.json

Every graph call is replaced by nothing. So a run of the bundle on the CPU backend costs what the
host of a GPU has to do: conditioning and kept tokens, tables, scalars and one call for each launch.
The copy of the conditioning into its table counts as well; on a GPU the device does it.

`--name` names the rows. Rows of other names in the output file are kept, so that two versions of
the code can be compared: run the script of one version with the packages of the other in
PYTHONPATH. Times are CPU times of the process, in milliseconds: medians and quartiles.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from sg_export import CompileOptions, compile
from sg_runtime.backends.ort import OrtLane
from sg_runtime.pipeline import Pipeline

RUNS = 200
STEPS = 40
SETTINGS: dict[str, dict[str, Any]] = {"γ 0/0.5": {}, "γ 0.25/0.5": {"strong_sparsity": 0.25}}
"""Arguments of `Pipeline.guidance` by the name of a setting."""


@dataclass(frozen=True, slots=True)
class Row:
    """CPU times of `runs` runs of STEPS steps, in milliseconds."""

    name: str
    setting: str
    images: int
    runs: int
    median_ms: float
    quartiles_ms: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="now")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    OrtLane.bind = bind_nothing  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        bundle = compile("glyphs", CompileOptions(Path(folder) / "glyphs", (0.5,), strong_sparsity=(0.0, 0.25))).path
        rows = [measure(options.name, bundle, setting, images) for setting in SETTINGS for images in (1, 4)]
    for row in rows:
        print(f"{row.name:8} {row.setting:12} {row.images} images  {row.median_ms:.2f} ms  {row.quartiles_ms}")
    if options.output:
        earlier = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
        kept = [row for row in earlier if row["name"] != options.name]
        content = {"machine": machine("numpy"), "rows": [*kept, *map(asdict, rows)]}
        options.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def bind_nothing(lane: OrtLane, graph: Any, inputs: Any, outputs: Any, **_: Any) -> Any:
    """Zero the outputs, once, and return a call that does nothing."""
    for array in outputs.values():
        array[...] = 0
    return lambda: None


def measure(name: str, bundle: Path, setting: str, images: int) -> Row:
    """Time runs of the bundle after a first one."""
    pipe = Pipeline.load(bundle, backend="onnxruntime-cpu")
    guidance = pipe.guidance(**SETTINGS[setting])
    times = []
    for number in range(RUNS + 1):
        began = time.process_time()
        pipe.sample([*range(images)], [number + i for i in range(images)], steps=STEPS, guidance=guidance)
        times.append((time.process_time() - began) * 1e3)
    low, median, high = np.percentile(times[1:], [25, 50, 75])
    return Row(name, setting, images, RUNS, round(float(median), 3), (round(float(low), 3), round(float(high), 3)))


if __name__ == "__main__":
    main()
