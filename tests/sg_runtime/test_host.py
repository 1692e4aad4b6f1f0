"""Facts of this process."""

from types import SimpleNamespace

import pytest

import sg_runtime.host


def test_peak_memory_is_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reports the peak in a file; other systems report it by `getrusage`.

    On Linux `getrusage` may include the parent process.
    """
    peak = sg_runtime.host.peak_memory()
    assert 50e6 < peak < 20e9
    monkeypatch.setattr(sg_runtime.host, "Path", lambda name: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(sg_runtime.host.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=123))
    assert sg_runtime.host.peak_memory() == 123
