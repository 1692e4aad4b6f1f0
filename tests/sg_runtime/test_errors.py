"""The exit codes, on which scripts rely."""

import pytest

from sg_runtime import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.SgError, 1),
        (errors.UsageError, 2),
        (errors.MissingExtraError, 2),
        (errors.ExportError, 3),
        (errors.EngineError, 4),
        (errors.GateError, 5),
        (errors.BundleError, 6),
        (errors.CheckpointError, 6),
    ],
)
def test_exit_code_of_a_kind_is_as_documented(kind: type[errors.SgError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, errors.SgError)
