"""A copy of a real bundle to damage, and a check of the refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.errors import BundleError
from sg_runtime.pipeline import Pipeline


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy of a complete bundle, which tests damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit(bundle: Path) -> Callable[[Callable[[Any], object]], None]:
    """Return a function that passes the bundle's manifest, as parsed JSON, through a function."""

    def edit(change: Callable[[Any], object]) -> None:
        content = json.loads((bundle / "manifest.json").read_bytes())
        change(content)
        (bundle / "manifest.json").write_text(json.dumps(content))

    return edit


@pytest.fixture
def refused(bundle: Path) -> Callable[..., None]:
    """Return a function that asserts the bundle is refused before a graph is opened.

    The message must contain the given parts.
    """

    def refused(*parts: str) -> None:
        with pytest.raises(BundleError) as caught:
            Pipeline.load(bundle)
        assert caught.value.exit_code == 6
        message = str(caught.value)
        assert message.startswith(str(bundle)), "the message names the bundle first"
        for part in parts:
            assert part in message
        assert "\n" not in message

    return refused
