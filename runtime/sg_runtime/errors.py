"""Errors of every package. A class is a kind of fault and owns the exit code of the command line."""


class SgError(Exception):
    """Root of all errors that sg-export raises on purpose. The message names object, expected, found and remedy."""

    exit_code = 1


class UsageError(SgError):
    """A request that is wrong, or known to be unsupported, before any work."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""


class ExportError(SgError):
    """A graph could not be made from the model."""

    exit_code = 3


class EngineError(SgError):
    """A backend could not build or open a graph."""

    exit_code = 4


class DeviceError(SgError):
    """A device is not there, lost, or answers with an error."""

    exit_code = 6


class DeviceMemoryError(DeviceError):
    """The memory of a device does not suffice."""


class NonFiniteError(SgError):
    """A run ended in values that are no numbers."""

    exit_code = 5


class GateError(SgError):
    """A parity or quality gate failed."""

    exit_code = 5


class BundleError(SgError):
    """A bundle is damaged or unusable here."""

    exit_code = 6


class CalibrationError(SgError):
    """Calibration data, or a table of ranges, is damaged or of another model."""

    exit_code = 6


class CheckpointError(SgError):
    """A checkpoint is missing, damaged, or of no family that an adapter covers."""

    exit_code = 6
