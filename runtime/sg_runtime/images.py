"""Convert samples to pixels and write image files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sg_runtime.errors import UsageError
from sg_runtime.files import replacing


def to_pixels(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert (B, C, H, W) float32 in [-1, 1] to (B, H, W, C) uint8; clip other values."""
    levels = np.rint(x.transpose(0, 2, 3, 1) * 127.5 + 127.5)
    pixels: NDArray[np.uint8] = np.clip(levels, 0, 255).astype(np.uint8)
    return pixels


def grid(images: NDArray[np.uint8], columns: int | None = None, zoom: int = 1) -> NDArray[np.uint8]:
    """Arrange images (B, H, W, C) in rows of `columns`; by default in a near-square.

    zoom: number of times each pixel is repeated in both directions.
    """
    count, height, width, channels = images.shape
    columns = min(count, columns or int(np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return sheet.reshape(rows * height, columns * width, channels).repeat(zoom, axis=0).repeat(zoom, axis=1)


def save_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write (H, W, C) uint8, C = 1 or 3, as PNG. Replaces an existing file atomically."""
    if pixels.shape[-1] not in (1, 3):
        raise UsageError(f"{path}: a PNG has 1 or 3 channels, found {pixels.shape[-1]}; save latents as .npy")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
