"""The page that shows bundles side by side, and its display in a browser."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sg_export.report.collect import Page, collect
from sg_export.report.page import _lines, render
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.manifest import write_manifest

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "link", "img"}


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tiny_int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of the tiny model in FP32 and in INT8. HTML must escape the name of the second."""
    named = tmp_path_factory.mktemp("report") / "int8<&>"
    named.symlink_to(tiny_int8_bundle)
    return [tiny_bundle, named]


@pytest.fixture(scope="module")
def page(bundles: list[Path]) -> Page:
    return collect(bundles)


def test_collect_of_two_bundles_compares_the_second_with_the_first(page: Page) -> None:
    first, second = page.bundles
    assert (first.quality, first.runs) == (None, None)
    assert second.quality is not None
    assert second.runs is not None
    assert len(second.quality) == 25
    assert 0 < max(q.guided for q in second.quality) < 1
    assert second.bytes < first.bytes
    assert page.mask_noise > 0
    assert first.samples == {}, "latents have no images to show"


def test_collect_of_bundles_of_two_models_is_refused(bundles: list[Path], tiny_edm_bundle: Path) -> None:
    with pytest.raises(UsageError, match="expected a bundle of the same checkpoint as"):
        collect([bundles[0], tiny_edm_bundle])


def test_collect_of_pixels_samples_every_mode_that_was_built(
    tiny: Any, once: Callable[..., Path], build_once: Callable[..., Path]
) -> None:
    """A model with one channel is one of pixels, unless its facts say otherwise."""
    config = replace(tiny.config, depth=1, channels=1)
    pixels = replace(tiny, config=config, facts={**tiny.facts, "route": "0-0"})
    bundle = build_once("pixels-bundle", once("pixels.safetensors", pixels.save), sparsity=(0.5,), batch=8)
    (own,) = collect([bundle]).bundles
    assert set(own.samples) == {"none", "cfg", "sg"}
    assert all(grid.shape == (256, 256, 1) for grid in own.samples.values())
    assert not np.array_equal(own.samples["none"], own.samples["sg"])


class Reader(HTMLParser):
    """Parser that records what a page loads and checks that its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href") and value is not None]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ignore self-closing elements, which are part of SVG."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_render_of_a_page_needs_nothing_else(page: Page) -> None:
    reader = Reader()
    text = render(page)
    reader.feed(text)
    assert not reader.open
    assert all(load.startswith("data:") for load in reader.loads)
    assert not re.search(r"https?://|<script", text)


def test_render_of_a_page_shows_what_was_measured(page: Page) -> None:
    text = render(page)
    second = page.bundles[1]
    assert second.quality is not None
    plan = second.manifest.quantization
    assert plan is not None
    assert f"{max(q.guided for q in second.quality):.2%}" in text
    assert f"{page.mask_noise:.2%}" in text
    for layer in plan.layers:
        assert f">{layer.name}</div>" in text
        assert ("excluded" if layer.sensitivity is None else f"{layer.sensitivity:.2%}") in text
    assert "int8&lt;&amp;&gt;" in text
    assert "the bundles have no decoder" in text


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize("width", [1100, 390])
def test_page_in_a_browser_has_no_errors_and_fits_the_screen(page: Page, tmp_path: Path, width: int) -> None:
    """The screen is wide or narrow. Tables could scroll, but none is cut off."""
    assert BROWSER is not None
    text = render(page).replace(
        "</body>",
        "<script>document.title = document.documentElement.scrollWidth + '/' + window.innerWidth + '/' + "
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length</script></body>",
    )
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", f"--window-size={width},900", "--dump-dom", path.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in found.stderr
    sizes = re.search(r"<title>(\d+)/(\d+)/(\d+)</title>", found.stdout)
    assert sizes is not None
    assert int(sizes[1]) <= int(sizes[2])
    assert sizes[3] == "0"


def test_render_of_a_bundle_that_fails_its_gates_says_so(page: Page, bundles: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundles[1], tmp_path / "failing"))
    manifest = Bundle.open(copy).manifest
    plan = manifest.quantization
    assert plan is not None
    failing = replace(plan, passed=False, remarks=("its gates do not hold: by a little",))
    write_manifest(replace(manifest, quantization=failing), copy / "manifest.json")
    worse = replace(page.bundles[1], manifest=Bundle.open(copy).manifest)
    assert "its gates do not hold: by a little" in render(replace(page, bundles=(page.bundles[0], worse)))


def test_lines_name_both_axes_and_the_gates() -> None:
    chart = _lines([[(1.0, 0.02), (0.1, 0.04)]], [0.1], "sigma")
    for text in ("sigma", "relative L2 distance", "gate 10.0%", "0%", "2%", "10%"):
        assert f">{text}</text>" in chart
