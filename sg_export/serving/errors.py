"""Errors of the HTTP interface: status and body of each, in the form that OpenAI's clients read."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from sg_runtime.errors import (
    BundleError,
    DeadlineError,
    DeviceError,
    NonFiniteError,
    QueueFullError,
    RefusedError,
    SgError,
    UsageError,
)
from sg_runtime.service.request import FieldError

CLOSED_REQUEST = 499
"""Status of a request whose client went away. Nobody receives it; logs and metrics have it."""


class ApiError(Exception):
    """A request cannot be served.

    status: HTTP status.
    code: name of the fault for programs.
    param: field of the request that is at fault.
    headers: further headers of the response.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        known = {401: "authentication_error", 429: "rate_limit_error"}
        return known.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def response(self) -> JSONResponse:
        """Return the response with this error."""
        body: dict[str, Any] = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, self.headers)


FIELDS = {"conditions": "prompt", "seeds": "seed"}
"""Fields of a request in the HTTP interface, if their names differ from those of `Request`."""


def api_error(error: SgError) -> ApiError:
    """Return an error of the runtime as one of the HTTP interface."""
    message = str(error).replace("`", "")
    if isinstance(error, QueueFullError):
        return ApiError(429, "queue_full", message, headers={"Retry-After": f"{error.retry_after:.0f}"})
    if isinstance(error, FieldError):
        return ApiError(422, "invalid_value", message, FIELDS.get(error.field, error.field))
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            return ApiError(status, code, message)
    return ApiError(500, "internal_error", message)


_STATUSES: tuple[tuple[type[SgError], int, str], ...] = (
    (DeadlineError, 504, "deadline"),
    (NonFiniteError, 422, "not_finite"),
    (UsageError, 422, "invalid_value"),
    (BundleError, 503, "bundle_changed"),
    (DeviceError, 503, "device"),
    (RefusedError, 503, "unavailable"),
)
