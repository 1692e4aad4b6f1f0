"""Device memory of a bundle with text encoder and decoder, on the driver's stand-in."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_stand_in import Driver
from ort_stand_in import Sessions

import sg_runtime.backends.choice
import sg_runtime.backends.ort
from sg_runtime.errors import DeviceMemoryError
from sg_runtime.pipeline import Pipeline

ASKED: dict[str, Any] = {"prompts": ["a cat", "a dog"], "seeds": [1, 2], "steps": 2}


@pytest.fixture
def load(driver: Driver, monkeypatch: pytest.MonkeyPatch, full_bundle: Path) -> Callable[..., Pipeline]:
    stand_in = Sessions(driver)
    stand_in.opened = deque(maxlen=0)  # type: ignore[assignment]  # it would keep the weights
    monkeypatch.setattr(sg_runtime.backends.ort, "open_session", stand_in.open)
    monkeypatch.setattr(sg_runtime.backends.choice, "check_cuda_provider", lambda number: None)
    return lambda **how: Pipeline.load(full_bundle, backend="onnxruntime-cuda", **how)


@pytest.fixture
def peak(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list whose last number is the largest number of bytes in use so far."""
    found, allocate = [0], driver.cuMemAlloc

    def counted(bytesize: int) -> Any:
        result = allocate(bytesize)
        found.append(max(found[-1], driver.used))
        return result

    monkeypatch.setattr(driver, "cuMemAlloc", counted)
    return found


def test_parts_that_are_closed_leave_their_memory(
    load: Callable[..., Pipeline], peak: list[int], driver: Driver, full_bundle: Path
) -> None:
    """A card that does not hold the denoiser next to another part runs one at a time."""
    expected = Pipeline.load(full_bundle, "cpu")(**ASKED)
    peaks = {}
    for keep in ("all", "step", "one"):
        peak.append(0)
        pipe = load(keep=keep)
        np.testing.assert_array_equal(pipe(**ASKED), expected)
        peaks[keep] = peak[-1]
        pipe.release()
        del pipe
    assert peaks["one"] < peaks["step"] < peaks["all"]
    driver.total = peaks["step"] - 1
    np.testing.assert_array_equal(load(keep="one")(**ASKED), expected)
    pipe = load()
    with pytest.raises(DeviceMemoryError, match=r"one image: step \d+ MB, text \d+ MB, decode \d+ MB; .*keep=\"one\""):
        pipe(**ASKED)
