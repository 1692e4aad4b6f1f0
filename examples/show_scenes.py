"""Draw pictures of `scenes` without guidance, by CFG and by Sparse Guidance, at equal seeds.

sg-export build scenes --strong-sparsity 0.5 --sparsity 0.9 -o scenes-bundle
python -m examples.show_scenes scenes-bundle -o scenes.png
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sg_runtime import Pipeline
from sg_runtime.images import save_png
from sg_runtime.manifest import GuidancePlan

PROMPTS = (
    "a fox left of an apple on blue",
    "three stars on purple",
    "a rocket above a house on black over green",
    "a panda and a mushroom on yellow",
    "a small car right of a large umbrella",
    "a frog, a heart and a ball on white",
)

ZOOM = 2
MARGIN = 8
WHITE = (255, 255, 255)
INK = (40, 40, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="bundle of the reference model scenes, built for sg")
    parser.add_argument("--output", "-o", type=Path, required=True, help="file of the picture, a .png")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first column (default %(default)s)")
    parser.add_argument("--scale", type=float, default=2.0, help="scale of Sparse Guidance (default %(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=3.0, help="scale of CFG (default %(default)s)")
    options = parser.parse_args()
    pipe = Pipeline.load(options.bundle)
    plans = {
        "no guidance": pipe.guidance("none"),
        f"CFG, scale {options.cfg_scale:g}": pipe.guidance("cfg", scale=options.cfg_scale),
        f"SG, scale {options.scale:g}": pipe.guidance("sg", scale=options.scale),
    }
    save_png(sheet(sampled(pipe, plans, options.seed), PROMPTS), options.output)
    print(f"{options.output}: {len(plans) * len(PROMPTS)} pictures")


def sampled(pipe: Pipeline, plans: Mapping[str, GuidancePlan], seed: int) -> dict[str, NDArray[np.uint8]]:
    """Sample a picture of each prompt by each guidance: (P, 64, 64, 3) by name."""
    seeds = range(seed, seed + len(PROMPTS))
    return {name: pipe(prompts=list(PROMPTS), seeds=seeds, guidance=plan) for name, plan in plans.items()}


def sheet(rows: Mapping[str, NDArray[np.uint8]], captions: Sequence[str]) -> NDArray[np.uint8]:
    """Draw a row of pictures (P, H, W, 3) for each name, and the captions below: (H', W', 3)."""
    side = ZOOM * next(iter(rows.values())).shape[1]
    font = ImageFont.load_default(size=13)
    left = MARGIN + round(max(font.getlength(name) for name in rows)) + MARGIN
    page = Image.new(
        "RGB", (left + len(captions) * (side + MARGIN), len(rows) * (side + MARGIN) + 4 * 16 + MARGIN), WHITE
    )
    draw = ImageDraw.Draw(page)
    for line, (name, pictures) in enumerate(rows.items()):
        top = MARGIN + line * (side + MARGIN)
        draw.text((MARGIN, top + side / 2), name, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            page.paste(tile, (left + column * (side + MARGIN), top))
    for column, caption in enumerate(captions):
        text, place = "", (left + column * (side + MARGIN) + side / 2, len(rows) * (side + MARGIN) + MARGIN)
        for word in caption.split():
            longer = f"{text} {word}".strip()
            text = longer if font.getlength(longer.split("\n")[-1]) <= side else f"{text}\n{word}"
        draw.multiline_text(place, text, fill=INK, font=font, anchor="ma", align="center")
    return np.asarray(page)


if __name__ == "__main__":
    main()
