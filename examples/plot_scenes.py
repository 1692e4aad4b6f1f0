"""Draw the training curve of `scenes`.

python -m examples.plot_scenes runs/scenes/curve.json -o docs/scenes-training.png
"""

import argparse
import json
from pathlib import Path

from examples.train_scenes import BATCH, EARLY

LINES = {"loss": "training, γ 0.5", "held_out_routed": "new scenes, γ 0.5", "held_out_dense": "new scenes, dense"}
"""Label of each line, by its name in the file. New scenes are seen by the averaged weights."""


def main() -> None:
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", type=Path, help="file that the training wrote")
    parser.add_argument("--output", "-o", type=Path, required=True, help="file of the picture, a .png")
    options = parser.parse_args()
    curve = json.loads(options.curve.read_bytes())
    scenes = [point["step"] * BATCH / 1e3 for point in curve]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in LINES.items():
        axes.plot(scenes, [point[name] for point in curve], label=label)
    axes.axvline(EARLY * BATCH / 1e3, color="grey", linestyle=":", label="early checkpoint")
    axes.set(
        xlabel="thousand scenes", ylabel="velocity loss", ylim=(0.9 * min(p["held_out_dense"] for p in curve), 0.6)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
