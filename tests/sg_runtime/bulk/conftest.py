"""Requests for small jobs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.bulk import Request


@pytest.fixture
def request_of(picture_bundle: Path) -> Callable[..., Request]:
    """Return a function that makes a request for 10 images, in shards of 4 and runs of 3."""

    def make(**changes: Any) -> Request:
        usual = {"bundle": picture_bundle, "count": 10, "shard": 4, "batch": 3, "steps": 2, "threads": 1}
        return Request(**{**usual, **changes})

    return make
