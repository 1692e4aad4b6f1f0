"""Convert samples to pixels and write image files."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sg_runtime.errors import UsageError
from sg_runtime.files import replacing

CAPTION_LINES = 3
"""Maximum number of lines of a caption."""


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


def captioned(images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.uint8]:
    """Write a caption below each image (B, H, W, C). All images grow by the height of the longest.

    A caption is broken into lines that fit, at most CAPTION_LINES.
    """
    count, height, width, channels = images.shape
    font = ImageFont.load_default(max(9, width // 20))
    texts = [_lines(caption, font, width - 4) for caption in captions]
    line = sum(font.getmetrics()) + 1 if isinstance(font, ImageFont.FreeTypeFont) else 11
    below = max(map(len, texts)) * line + 4
    made = np.zeros((count, height + below, width, channels), np.uint8)
    for number, lines in enumerate(texts):
        strip = Image.new("L", (width, below))
        ImageDraw.Draw(strip).multiline_text((2, 1), "\n".join(lines), fill=255, font=font, spacing=1)
        made[number, :height] = images[number]
        made[number, height:] = np.asarray(strip)[..., None]
    return made


def _lines(caption: str, font: Any, width: int) -> list[str]:
    """Break a caption into lines of at most `width` pixels; a cut caption ends in "…"."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} …"]
    return lines


def png_bytes(pixels: NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> bytes:
    """Return (H, W, C) uint8, C = 1 or 3, as the content of a PNG file.

    texts: text chunks by keyword.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_itxt(name, text)
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=chunks)
    return content.getvalue()


def save_png(pixels: NDArray[np.uint8], path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write (H, W, C) uint8, C = 1 or 3, as PNG. Replaces an existing file atomically.

    texts: text chunks by keyword.
    """
    if pixels.shape[-1] not in (1, 3):
        raise UsageError(f"{path}: a PNG has 1 or 3 channels, found {pixels.shape[-1]}; save latents as .npy")
    with replacing(path) as temporary:
        temporary.write_bytes(png_bytes(pixels, texts))
