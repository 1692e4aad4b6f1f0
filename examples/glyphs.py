"""Glyphs data set: 62 characters in 16 fonts as 16×16 grey images with random distortions.

The fonts are the DejaVu and STIX files of matplotlib, so the data set is the same on every machine.
Four fonts, one of each group, are held out of training.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CLASS_NAMES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
SIZE = 16
HELD_OUT_FONTS = ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBol")
TRAINING_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
)

_CANVAS = 64  # glyphs are rendered at four times the size, then averaged down
_BASELINE = 48
_POINTS = 48


def render(fonts: tuple[str, ...], variants: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render `variants` distortions of every character in every font.

    Returns images (len(fonts) * 62 * variants, 16, 16) uint8 with ink 255 on background 0, and
    their classes (len(fonts) * 62 * variants,) int64. Each image is rotated, sheared, scaled and
    shifted by random amounts drawn from `seed`.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(seed)
    images, classes = [], []
    for name in fonts:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), _POINTS)
        for index, character in enumerate(CLASS_NAMES):
            glyph = Image.new("L", (_CANVAS, _CANVAS))
            ImageDraw.Draw(glyph).text((_CANVAS / 2, _BASELINE), character, fill=255, font=font, anchor="ms")
            for _ in range(variants):
                moved = glyph.transform(
                    glyph.size, Image.Transform.AFFINE, _random_affine(rng), Image.Resampling.BILINEAR
                )
                images.append(np.asarray(moved.resize((SIZE, SIZE), Image.Resampling.BOX)))
                classes.append(index)
    return np.stack(images), np.array(classes, dtype=np.int64)


def _random_affine(rng: np.random.Generator) -> tuple[float, float, float, float, float, float]:
    """Return Pillow's coefficients of a random rotation, shear, scale and shift about the centre.

    The coefficients map output pixels to input pixels.
    """
    angle = math.radians(rng.uniform(-10, 10))
    shear = rng.uniform(-0.15, 0.15)
    scale_x, scale_y = rng.uniform(0.9, 1.1, size=2)
    shift = rng.uniform(-4, 4, size=2)  # at most one pixel of the result in each direction
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag([1 / scale_x, 1 / scale_y])
    centre = np.full(2, _CANVAS / 2)
    offset = centre - matrix @ (centre + shift)
    return (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
