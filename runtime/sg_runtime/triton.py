"""A model of Triton's Python backend: each instance answers requests from a service over a bundle.

`sg-export triton` writes the model repository whose `model.py` imports this module.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sg_runtime.errors import BundleError, DeviceError, RefusedError, SgError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.guidance import Ramp
from sg_runtime.manifest import MANIFEST_FILE, Labels, Manifest
from sg_runtime.pipeline import Pipeline
from sg_runtime.service import Answer, Request, Service, ServiceSettings

BUNDLE_FOLDER = "bundle"
"""Name of the bundle's folder next to `model.py`."""

IGNORED = ("binary_data_output", "triton_")
"""Beginnings of the names of request parameters that are Triton's own."""


class TritonPythonModel:
    """An instance of the model, as Triton's Python backend calls it. It has its own process."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle on the device of this instance.

        args: what Triton says of the model and the instance. Raises SgError, which Triton reports
        when it loads the model.
        """
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        bundle = Path(args["model_repository"], args["model_version"], BUNDLE_FOLDER)
        check_fingerprint(bundle, settings["fingerprint"])
        pipe = Pipeline.load(
            bundle,
            device_of(args["model_instance_kind"], args["model_instance_device_id"]),
            backend=settings["backend"] or None,
            batch=int(settings["batch"]),
            threads=int(settings["threads"]) if settings["threads"] else None,
        )
        self._max_steps = int(settings["max_steps"])
        self._manifest = pipe.bundle.manifest
        # Triton has gathered the batch and has the queue.
        self._service = Service(pipe, ServiceSettings(window=0, queue=max(pipe.batch, config["max_batch_size"])))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response for each request of a batch. An error concerns its own request alone.

        Requests with equal parameters share a run.
        """
        with self._service.together():
            asked = [self._submit(request) for request in requests]
        return [self._response(future) for future in asked]

    def finalize(self) -> None:
        """Close the service. Triton calls it when it unloads the model."""
        self._service.close()

    def _submit(self, request: Any) -> "Future[Answer] | SgError":
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            given = json.loads(request.parameters() or "{}")
            return self._service.submit(request_of(self._manifest, inputs, given, self._max_steps))
        except SgError as error:
            return error

    def _response(self, asked: "Future[Answer] | SgError") -> Any:
        """Return the response with the images, or with the error."""
        error = asked if isinstance(asked, SgError) else asked.exception()
        if error is not None:
            message = str(error).replace("`", "")
            told = self._pb.TritonError(message, getattr(self._pb.TritonError, code_of(error)))
            return self._pb.InferenceResponse(output_tensors=[], error=told)
        assert isinstance(asked, Future)
        return self._pb.InferenceResponse(output_tensors=[self._pb.Tensor("image", asked.result().images)])


def check_fingerprint(bundle: Path, expected: str) -> None:
    """Raise BundleError unless the manifest of a bundle has this SHA-256, in hex."""
    try:
        found = sha256_of(bundle / MANIFEST_FILE)
    except OSError as error:
        raise BundleError(
            f"{bundle}: expected the bundle of this model, found none ({error.strerror}): write the repository again "
            f"with sg-export triton"
        ) from None
    if found != expected:
        raise BundleError(
            f"{bundle}: expected the bundle that config.pbtxt names (manifest {expected[:12]}…), found another one "
            f"({found[:12]}…): write the repository again with sg-export triton"
        )


def device_of(kind: str, number: str) -> str:
    """Return the device of an instance, for `Pipeline.load`.

    kind: "CPU" or "GPU", with the prefix "KIND_" or without. number: number of the GPU.
    """
    return f"cuda:{number}" if kind.removeprefix("KIND_") == "GPU" else "cpu"


def code_of(error: BaseException) -> str:
    """Return the name of Triton's error code for an error of a request."""
    if isinstance(error, UsageError):
        return "INVALID_ARG"
    return "UNAVAILABLE" if isinstance(error, (BundleError, DeviceError, RefusedError)) else "INTERNAL"


def request_of(
    manifest: Manifest, inputs: Mapping[str, NDArray[Any]], parameters: Mapping[str, Any], max_steps: int
) -> Request:
    """Return the request that a client's tensors and parameters ask for.

    inputs: tensors by name, each (N, 1): `seed` uint64, and for a model of classes `class` int64 or
    `class_name` bytes, for a model with text `prompt` bytes and perhaps `negative` bytes.
    parameters: the parameters of the request, by name; see `PARAMETERS`.
    max_steps: largest number of steps.

    Raises UsageError for a tensor or parameter that is missing, unknown or wrong. The service
    checks the values.
    """
    columns = {name: _column(name, values) for name, values in inputs.items()}
    named = ("class", "class_name") if isinstance(manifest.model.conditions, Labels) else ("prompt",)
    given = [name for name in named if name in columns]
    if len(given) != 1:
        raise UsageError(f"inputs: expected one of {', '.join(named)}, found {' and '.join(given) or 'none'}")
    conditions = tuple(columns[given[0]])
    negatives = set(columns.get("negative", ()))
    if len(negatives) > 1:
        raise UsageError(f"negative: expected the same for all images of a request, found {len(negatives)} different")
    known: dict[str, Any] = {}
    for name, value in parameters.items():
        if name in PARAMETERS:
            known[name] = PARAMETERS[name](name, value)
        elif not name.startswith(IGNORED):
            raise UsageError(f"parameter {name}: expected one of {', '.join(PARAMETERS)}")
    steps = known.get("steps")
    if steps is not None and steps > max_steps:
        raise UsageError(f"steps: expected at most {max_steps}, found {steps}")
    return Request(conditions, tuple(columns["seed"]), next(iter(negatives), None) or None, **known)


def _column(name: str, values: NDArray[Any]) -> list[Any]:
    """Return the values of a tensor (N, 1) as a list. Bytes become text."""
    if values.ndim != 2 or values.shape[1] != 1:
        raise UsageError(f"{name}: expected the shape (N, 1), found {values.shape}")
    try:
        return [value.decode() if isinstance(value, bytes) else value for value in values[:, 0].tolist()]
    except UnicodeDecodeError:
        raise UsageError(f"{name}: expected text in UTF-8, found other bytes") from None


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected a text, found {value!r}")
    return value


def _whole(name: str, value: object) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}: expected a whole number, found {value!r}")
    return value


def _ramp(name: str, value: object) -> Ramp:
    """Return a number, or the first and the last one of a text FIRST:LAST."""
    try:
        if isinstance(value, bool):
            raise ValueError
        found = [float(part) for part in value.split(":")] if isinstance(value, str) else [float(value)]  # type: ignore[arg-type]
        return found[0] if len(found) == 1 else _pair(found)
    except (TypeError, ValueError):
        raise UsageError(f"{name}: expected a number, or two as FIRST:LAST, found {value!r}") from None


def _size(name: str, value: object) -> tuple[int, int]:
    try:
        height, width = _pair(_text(name, value).lower().split("x"))
        return int(height), int(width)
    except ValueError:
        raise UsageError(f"{name}: expected HEIGHTxWIDTH in pixels, found {value!r}") from None


def _pair(values: Sequence[Any]) -> tuple[Any, Any]:
    first, last = values
    return first, last


PARAMETERS: dict[str, Callable[[str, object], Any]] = {
    "steps": _whole,
    "sampler": _text,
    "guidance": _text,
    "scale": _ramp,
    "sparsity": _ramp,
    "strong_sparsity": _ramp,
    "size": _size,
}
"""Parameters of a request, each with the function that reads it."""
