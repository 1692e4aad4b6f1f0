"""`sg-export triton` on a disk that is full or cannot be written."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("mount", "code", "message"),
    [
        ("-t tmpfs -o size=8k none", 3, "the disk is full; free some space, or give --output on another disk"),
        ("-t tmpfs -o ro none", 2, "cannot be written (Read-only file system): give another --output"),
    ],
    ids=["full", "read-only"],
)
def test_triton_leaves_nothing_on_a_disk_that_takes_no_model(
    mount: str, code: int, message: str, mounted: Callable[..., Any], picture_bundle: Any
) -> None:
    result = mounted(mount, "triton", picture_bundle, "-o", "disk")
    assert (result.returncode, result.stdout) == (code, "left:\n"), result.stderr
    assert result.stderr.startswith("Error: disk/picture-bundle: ")
    assert result.stderr.endswith(f"{message}\n")
