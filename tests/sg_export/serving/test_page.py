"""The page of a server in a real browser: what a person does, and the images that appear."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from browser import BROWSER, Tab, browsing

from sg_export.serving.app import Limits, make_app
from sg_export.serving.engine import LocalEngine
from sg_export.serving.server import listening
from sg_runtime.pipeline import Pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian's package chromium)"),
]

MODES = ("none", "cfg", "sg")
DONE = "document.querySelector('#status').textContent === 'Done.'"


@pytest.fixture
def address() -> Iterator[Callable[[Any], str]]:
    """Return a function that serves an application in this process, and returns its address."""
    servers: list[tuple[uvicorn.Server, threading.Thread, Any]] = []

    def serve(app: Any) -> str:
        opened = listening("127.0.0.1", 0)
        bound = opened.__enter__()
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        servers.append((server, thread, opened))
        return f"http://127.0.0.1:{bound.getsockname()[1]}/"

    yield serve
    for server, thread, opened in servers:
        server.should_exit = True
        thread.join(60)
        opened.__exit__(None, None, None)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def levels(build_once: Callable[..., Path], pixels: Path) -> Path:
    """Return a bundle of the model of `pixels` for SG at two sparsities."""
    checkpoint = pixels.parent / "named-pixels.safetensors"
    return build_once("pixels-levels", checkpoint, sparsity=(0.5, 0.25), batch=2)


def shown(tab: Tab, pictures: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the images of the page by mode."""
    found = {}
    for mode in MODES:
        source = tab.value(f"document.querySelector('#{mode} img').src")
        found[mode] = pictures({"data": [{"b64_json": source.removeprefix("data:image/png;base64,")}]})
    return found


@pytest.mark.parametrize("width", [1100, 390])
def test_page_fits_the_screen_and_every_field_has_a_name(
    tab: Tab, address: Callable[[Any], str], engine: LocalEngine, width: int
) -> None:
    tab.open(address(make_app([engine])), width)
    tab.until(DONE)
    assert tab.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.value("[...document.querySelectorAll('input, select, textarea')].every(e => e.labels.length === 1)")
    assert tab.value("[...document.querySelectorAll('img')].every(e => e.alt !== '' && !e.hidden)")
    assert tab.value("document.documentElement.lang") == "en"
    assert tab.problems == []


def test_class_scale_sparsity_and_seed_change_the_images(
    tab: Tab,
    address: Callable[[Any], str],
    local: Callable[..., LocalEngine],
    levels: Path,
    pictures: Callable[[Any], Any],
) -> None:
    """The keyboard picks class C, moves the scale by three tenths, and γ from 0.5 to 0.25."""
    tab.open(address(make_app([local(levels, "levels")])))
    tab.until(DONE)
    pipe = Pipeline.load(levels, "cpu", threads=1)
    first = shown(tab, pictures)
    assert np.array_equal(first["sg"], pipe([0], [0])[..., 0])
    assert not np.array_equal(first["sg"], first["none"])
    for selector, keys in (
        ("#class", ("ArrowDown", 2)),
        ("#scale", ("ArrowRight", 3)),
        ("#sparsity", ("ArrowLeft", 1)),
    ):
        tab.value(f"document.querySelector('{selector}').focus()")
        tab.press(*keys)
    assert tab.value("document.querySelector('#sparsity-value').value") == "0.25"
    assert tab.value("document.querySelector('#scale-value').value") == "2.3"
    tab.type("#seed", "41")
    tab.value("document.querySelector('#next').click()")
    tab.until(f"{DONE} && document.querySelector('#sg img').alt === 'SG, class C, seed 42'")
    plans = {
        "none": pipe.guidance("none"),
        "cfg": pipe.guidance("cfg", scale=2.3),
        "sg": pipe.guidance("sg", sparsity=0.25, scale=2.3),
    }
    for mode, image in shown(tab, pictures).items():
        assert np.array_equal(image, pipe([2], [42], guidance=plans[mode])[..., 0]), mode


def test_address_of_the_page_fills_its_fields(
    tab: Tab,
    address: Callable[[Any], str],
    engine: LocalEngine,
    local: Callable[..., LocalEngine],
    levels: Path,
    pictures: Callable[[Any], Any],
) -> None:
    app = make_app([engine, local(levels, "levels")])
    tab.open(f"{address(app)}?model=levels&class=C&seed=42&scale=2.3&sparsity=0.25&steps=3")
    tab.until(f"{DONE} && document.querySelector('#sg img').alt === 'SG, class C, seed 42'")
    pipe = Pipeline.load(levels, "cpu", threads=1)
    plan = pipe.guidance("sg", sparsity=0.25, scale=2.3)
    assert np.array_equal(shown(tab, pictures)["sg"], pipe([2], [42], steps=3, guidance=plan)[..., 0])


def test_page_asks_for_the_key_and_shows_images_of_a_typed_prompt(
    tab: Tab,
    address: Callable[[Any], str],
    local: Callable[..., LocalEngine],
    full_bundle: Path,
    pictures: Callable[[Any], Any],
) -> None:
    """The bundle is for CFG: its page says that it cannot run SG."""
    pytest.importorskip("tokenizers")
    tab.open(address(make_app([local(full_bundle, "prx")], key="secret")))
    tab.until("document.querySelector('#status').textContent.startsWith('key: expected the server')")
    tab.type("#key", "secret")
    tab.until("document.querySelector('#status').textContent === '1 of 3 images failed.'")
    tab.type("#prompt", "a red cube")
    tab.until("document.querySelector('#cfg img').alt === 'CFG, a red cube, seed 0'")
    tab.until("document.querySelector('#status').textContent === '1 of 3 images failed.'")
    assert tab.value("document.querySelector('#sg .error').textContent") == "This bundle cannot run SG."
    pipe = Pipeline.load(full_bundle, "cpu", threads=1)
    source = tab.value("document.querySelector('#cfg img').src").removeprefix("data:image/png;base64,")
    expected = pipe(prompts="a red cube", seeds=[0], scale=3.0)
    assert np.array_equal(pictures({"data": [{"b64_json": source}]}), expected)


def test_page_shows_why_an_image_failed(tab: Tab, address: Callable[[Any], str], engine: LocalEngine) -> None:
    tab.open(address(make_app([engine], Limits(steps=1))))
    tab.until("document.querySelector('#status').textContent === '3 of 3 images failed.'")
    assert tab.value("document.querySelector('#cfg .error').textContent") == "steps: expected 1 to 1, found 40"
