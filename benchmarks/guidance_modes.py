"""Draw samples of the reference model in every guidance mode as one picture.

All modes use the same classes and seeds.

python -m benchmarks.guidance_modes --output docs/guidance-modes.png
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.glyph_report import sheet
from sg_export import CompileOptions, compile
from sg_runtime import Pipeline
from sg_runtime.images import save_png
from sg_runtime.manifest import GuidancePlan

TEXT = "SparseGuidance"
"""Characters to sample, one per column."""

BANDS = 2
"""Number of rows of each mode. The seed of an image is its position in reading order."""

LEVELS = (0.0, 0.2, 0.4, 0.6)

BUILDS: Mapping[str, CompileOptions] = {
    "cfg": CompileOptions(Path("cfg-bundle"), guidance="cfg", scale=1.5),
    "sg": CompileOptions(Path("sg-bundle"), sparsity=(0.75,), scale=3.0),
    "cfg+sg": CompileOptions(Path("cfg-sg-bundle"), guidance="cfg+sg", sparsity=(0.75,), scale=1.5),
    "autoguidance": CompileOptions(
        Path("autoguidance-bundle"),
        weak_checkpoint="glyphs-early",
        strong_sparsity=LEVELS,
        sparsity=LEVELS[::-1],
        schedule="cosine",
        scale=2.0,
    ),
}

Choice = Callable[[Pipeline], GuidancePlan]

ROWS: Mapping[str, tuple[str, Choice]] = {
    "unguided": ("sg", lambda pipe: pipe.guidance("none")),
    "CFG\nscale 1.5": ("cfg", Pipeline.guidance),
    "SG\nsparsity 0 / 0.75\nscale 3": ("sg", Pipeline.guidance),
    "the same SG,\nfor t from 0.3 to 0.9": ("sg", lambda pipe: pipe.guidance(interval=(0.3, 0.9))),
    "CFG + SG\nsparsity 0 / 0.75\nscale 1.5": ("cfg+sg", Pipeline.guidance),
    "AutoGuidance + SG\n0 to 0.6 / 0.6 to 0\nscale 2": ("autoguidance", Pipeline.guidance),
}
"""Rows of the picture by label: name of the bundle, and the function that returns the guidance."""


def picture(builds: Mapping[str, CompileOptions], steps: int, folder: Path) -> NDArray[np.uint8]:
    """Build a bundle for each mode in `folder` and sample `TEXT` with each row's guidance.

    Returns the picture, (H, W, 1).
    """
    pipes = {
        name: Pipeline.load(compile("glyphs", replace(options, output=folder / options.output)).path)
        for name, options in builds.items()
    }
    classes = list(TEXT) * BANDS
    samples: dict[str, NDArray[np.uint8]] = {}
    for label, (name, choose) in ROWS.items():
        pipe = pipes[name]
        samples[label] = pipe(classes, range(len(classes)), steps=steps, guidance=choose(pipe))[..., 0]
    return sheet(samples, columns=len(TEXT), zoom=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/guidance-modes.png"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_png(picture(BUILDS, options.steps, Path(folder)), options.output)


if __name__ == "__main__":
    main()
