"""Pixels, sheets of images, and PNG files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sg_runtime.errors import UsageError
from sg_runtime.images import grid, save_png, to_pixels

few = settings(max_examples=50)


@pytest.mark.parametrize(
    ("value", "pixel"),
    [
        (-1.0, 0),
        (1.0, 255),
        (0.0, 128),  # 127.5 is a tie and goes to the even neighbour
        (-0.5 / 127.5, 127),
        (0.6 / 127.5, 128),
        (-1.5, 0),
        (7.0, 255),
        (float("-inf"), 0),
        (float("inf"), 255),
    ],
)
def test_to_pixels_of_a_value_rounds_and_clips(value: float, pixel: int) -> None:
    pixels = to_pixels(np.full((1, 1, 1, 1), value, dtype=np.float32))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[[[pixel]]]]


def test_to_pixels_of_the_256_levels_gives_them_back() -> None:
    expected = np.arange(256, dtype=np.uint8).reshape(2, 2, 8, 8)
    x = ((expected.astype(np.float64) - 127.5) / 127.5).astype(np.float32)
    np.testing.assert_array_equal(to_pixels(x), expected.transpose(0, 2, 3, 1))


def numbered(count: int, height: int, width: int, channels: int) -> np.ndarray:
    """Return images (B, H, W, C). Image k has the value k + 1, so that 0 is an empty cell."""
    return np.broadcast_to(
        np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None], (count, height, width, channels)
    )


@pytest.mark.parametrize(
    ("count", "columns", "cells"),
    [
        (1, None, [[1]]),
        (4, None, [[1, 2], [3, 4]]),
        (5, None, [[1, 2, 3], [4, 5, 0]]),
        (3, 2, [[1, 2], [3, 0]]),
        (2, 8, [[1, 2]]),
        (3, 1, [[1], [2], [3]]),
    ],
)
def test_grid_of_images_fills_rows_in_order(count: int, columns: int | None, cells: list[list[int]]) -> None:
    sheet = grid(numbered(count, 2, 3, 1), columns)
    expected = np.array(cells, dtype=np.uint8).repeat(2, axis=0).repeat(3, axis=1)[..., None]
    np.testing.assert_array_equal(sheet, expected)


@few
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 3))
def test_grid_of_any_images_holds_each_whole_and_zoomed(
    count: int, height: int, width: int, channels: int, zoom: int
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    sheet = grid(images, zoom=zoom)
    columns = sheet.shape[1] // (width * zoom)
    for index, image in enumerate(images):
        top, left = index // columns * height * zoom, index % columns * width * zoom
        cell = sheet[top : top + height * zoom, left : left + width * zoom]
        for row in range(zoom):
            for column in range(zoom):
                np.testing.assert_array_equal(cell[row::zoom, column::zoom], image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_save_png_of_pixels_reads_back_the_same(tmp_path: Path, channels: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    save_png(pixels, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.format == "PNG"
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("channels", [2, 4])
def test_save_png_of_other_channels_is_refused_and_writes_nothing(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "picture.png"
    with pytest.raises(UsageError, match=rf"a PNG has 1 or 3 channels, found {channels}; save latents as \.npy"):
        save_png(np.zeros((2, 2, channels), dtype=np.uint8), path)
    assert list(tmp_path.iterdir()) == []


def test_save_png_of_a_picture_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    save_png(np.ones((2, 2, 1), dtype=np.uint8), path)
    before = path.read_bytes()
    with pytest.raises((SystemError, ValueError)):  # Pillow's error for a picture without a size depends on its version
        save_png(np.zeros((0, 0, 1), dtype=np.uint8), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_png_over_an_old_picture_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    for value in (1, 2):
        save_png(np.full((2, 2, 1), value, dtype=np.uint8), path)
    with Image.open(path) as image:
        assert np.asarray(image).tolist() == [[2, 2], [2, 2]]
    assert list(tmp_path.iterdir()) == [path]
