"""Errors of all packages. Each class is one kind of fault and sets the CLI's exit code."""


class SgError(Exception):
    """Base class of all errors that sg-export raises on purpose.

    The message names the object, the expected value, the found value and the remedy. Parameters of
    the Python API are in backticks; the command line shows its option in place of each.
    """

    exit_code = 1


class UsageError(SgError):
    """A request is wrong or known to be unsupported. Raised before any work."""

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
    """A device is missing, was lost, or reports an error."""

    exit_code = 6


class DeviceMemoryError(DeviceError):
    """A device has too little memory."""


class NonFiniteError(SgError):
    """A sampling run ended in NaN or infinity."""

    exit_code = 5


class GateError(SgError):
    """A parity or quality gate failed."""

    exit_code = 5


class BundleError(SgError):
    """A bundle is damaged or unusable on this machine."""

    exit_code = 6


class JobError(SgError):
    """The folder of a sampling job is damaged."""

    exit_code = 6


class CalibrationError(SgError):
    """Calibration data or a range table is damaged or belongs to another model."""

    exit_code = 6


class CheckpointError(SgError):
    """A checkpoint is missing, damaged, or of a family that no adapter covers."""

    exit_code = 6


class RefusedError(SgError):
    """A service refused a request, or gave it up."""


class QueueFullError(RefusedError):
    """The queue of a service has no room for a request.

    retry_after: seconds after which the queue is likely to have room.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(RefusedError):
    """The deadline of a request passed before its last run began."""
