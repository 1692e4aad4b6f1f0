"""Fixtures of the tests of serving: a small bundle of pixels, its pipeline, and an application."""

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from sg_export.cli import main
from sg_export.serving.app import make_app
from sg_export.serving.engine import LocalEngine
from sg_runtime.pipeline import Pipeline
from sg_runtime.service import Service, ServiceSettings

BATCH = 2
NAMES = ["A", "B", "C", "0", "9"]


@pytest.fixture(scope="session")
def pixels(quick: Any, once: Callable[..., Path], build_once: Callable[..., Path]) -> Path:
    """Return a bundle of a tiny model of pixels with class names, for SG at 0 and 0.5.

    Its graphs are for two images.
    """
    named = replace(quick, config=replace(quick.config, channels=1), facts={**quick.facts, "class_names": NAMES})
    return build_once("pixels", once("named-pixels.safetensors", named.save), sparsity=(0.5,), batch=BATCH)


@pytest.fixture(scope="session")
def pipe(pixels: Path) -> Pipeline:
    """Return a pipeline of `pixels`, to compare with."""
    return Pipeline.load(pixels, "cpu", threads=1)


@pytest.fixture
def local() -> Iterator[Callable[..., LocalEngine]]:
    """Return a function that starts an engine in this process. It is closed after the test."""
    opened: list[Service] = []

    def start(bundle: Path, name: str = "pixels", **settings: Any) -> LocalEngine:
        on = Pipeline.load(bundle, "cpu", threads=1)
        opened.append(Service(on, ServiceSettings(**settings)))
        return LocalEngine(name, on.bundle, opened[-1])

    yield start
    for service in opened:
        service.close()


@pytest.fixture
def engine(local: Callable[..., LocalEngine], pixels: Path) -> LocalEngine:
    return local(pixels)


@pytest.fixture
def client(engine: LocalEngine) -> TestClient:
    return TestClient(make_app([engine]))


@pytest.fixture(scope="session")
def pictures() -> Callable[[Any], NDArray[np.uint8]]:
    """Return a function that returns the images of a response."""

    def read(body: Any) -> NDArray[np.uint8]:
        files = [base64.b64decode(image["b64_json"], validate=True) for image in body["data"]]
        return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])

    return read


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Return a function that runs a command in this process."""
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
