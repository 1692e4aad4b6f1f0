"""The picture of `guidance_modes`, from an existing bundle."""

from pathlib import Path
from typing import get_args

import pytest

from benchmarks import guidance_modes
from benchmarks.guidance_modes import BANDS, BUILDS, ROWS, TEXT, picture
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import GuidanceMode


def test_rows_use_every_build_and_builds_are_every_guided_mode() -> None:
    assert {name for name, _ in ROWS.values()} == set(BUILDS)
    assert {options.mode for options in BUILDS.values()} == {*get_args(GuidanceMode)} - {"none"}


@pytest.mark.slow
def test_picture_of_two_rows_shows_every_character(glyphs_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def compile(checkpoint: str, options: object) -> Bundle:
        built.append(options)
        return Bundle.open(glyphs_bundle)

    monkeypatch.setattr(guidance_modes, "compile", compile)
    monkeypatch.setattr(guidance_modes, "ROWS", {label: row for label, row in ROWS.items() if row[0] == "sg"})
    page = picture({"sg": BUILDS["sg"]}, 1, Path("folder"))
    assert [options.output for options in built] == [Path("folder/sg-bundle")]  # type: ignore[attr-defined]
    assert page.shape[0] > 3 * BANDS * 64
    assert page.shape[1] > len(TEXT) * 64
