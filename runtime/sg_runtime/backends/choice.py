"""Choice of the backend for a bundle on this machine, with the reasons against faster backends."""

import logging
import re
from dataclasses import dataclass

from sg_runtime.backends.base import Backend
from sg_runtime.backends.ort_check import check_cuda_provider
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, SgError, UsageError
from sg_runtime.extras import require
from sg_runtime.manifest import ENGINE_NAMES, ENGINE_TARGETS, EngineLibrary, PartFacts
from sg_runtime.manifest.base import whole_number
from sg_runtime.requests import expect

LOG = logging.getLogger("sg_runtime")

BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "onnxruntime-cpu")
"""All backends. An automatic choice takes the first that works."""

_LIBRARIES: dict[str, EngineLibrary] = {target: library for library, target in ENGINE_TARGETS.items()}
"""Engine library of each backend that runs prebuilt engines."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen backend.

    name: name of the backend, as in BACKENDS. number: number of its GPU. rejected: why each earlier
    candidate was rejected.
    """

    name: str
    number: int
    rejected: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join([self.name, *(f"not {reason}" for reason in self.rejected)])


def choose_backend(
    bundle: Bundle, device: str = "auto", *, backend: str | None = None, batch: int | None = None
) -> Choice:
    """Choose the first of BACKENDS that can run the bundle on `device`.

    device: "auto", "cpu", "cuda", or a numbered GPU such as "cuda:1".
    backend: the only candidate, if given.
    batch: number of images that the engines must have a profile for, if given.

    Raises UsageError for an unknown device, backend or batch. If no backend can run the bundle,
    raises the error of the backend it was built for.
    """
    expect("bundle", bundle, Bundle, "a Bundle, which `Bundle.open(path)` returns")
    kind, number = _parse(device)
    expect("backend", backend, str, f"one of {', '.join(BACKENDS)}")
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if batch is not None:
        whole_number("batch", batch)
    names: tuple[str, ...] = BACKENDS if backend is None else (backend,)
    names = tuple(name for name in names if kind == "auto" or (name == "onnxruntime-cpu") == (kind == "cpu"))
    if not names:
        raise UsageError(f"backend {backend}: does not run on device {device}: leave one of them out")
    errors: dict[str, SgError] = {}
    for name in names:
        try:
            _check(bundle, name, number, batch)
        except SgError as error:
            errors[name] = error
        else:
            choice = Choice(name, number, tuple(f"{name}: {error}" for name, error in errors.items()))
            LOG.info("%s: %s", bundle.path, choice)
            return choice
    if backend is not None and isinstance(errors[backend], _NothingForItError):
        target = "onnxruntime" if backend.startswith("onnxruntime") else backend
        command = build_command(bundle.manifest, str(bundle.path), target=target)
        raise BundleError(f"{bundle.path}: {backend}: {errors[backend]}; build it for this backend: {command}")
    if bundle.manifest.onnx_target == "onnxruntime-cuda" and "onnxruntime-cuda" in errors:
        raise errors["onnxruntime-cuda"]
    meant = [error for error in errors.values() if not isinstance(error, _NothingForItError)] or [*errors.values()]
    raise meant[0] if bundle.manifest.engines else meant[-1]


def choose_onnx_backend() -> Choice | None:
    """Return the backend that device "auto" takes here for ONNX graphs, None if there is none."""
    rejected: list[str] = []
    for name in BACKENDS:
        if name in _LIBRARIES:
            continue
        try:
            _check_provider(name, 0)
        except SgError as error:
            rejected.append(f"{name}: {error}")
        else:
            return Choice(name, 0, tuple(rejected))
    return None


def open_backend(
    bundle: Bundle,
    device: str = "auto",
    *,
    backend: str | None = None,
    batch: int | None = None,
    stream: object | None = None,
    capture: bool = True,
    threads: int | None = None,
    part: PartFacts | None = None,
) -> Backend:
    """Open the backend that `choose_backend` chooses.

    stream: CUDA stream to run in; see `cuda.stream_handle`.
    capture: whether runs are captured as CUDA graphs if the backend supports it.
    threads: number of threads of a run on the CPU; None for those that the process may use.
    part: part whose graphs it runs; None for the denoiser.

    Raises UsageError if `stream` is given on the CPU or `threads` on a GPU, and BundleError for a
    part in BF16 on the CPU.
    """
    choice = choose_backend(bundle, device, backend=backend, batch=batch)
    if part is not None:
        check_part(bundle, part, choice.name)
    if stream is not None and choice.name == "onnxruntime-cpu":
        raise UsageError(f"stream: expected none on the CPU, which was chosen: {choice}")
    if threads is not None and choice.name != "onnxruntime-cpu":
        raise UsageError(f"`threads`: expected none on a GPU, which was chosen: {choice}")
    if choice.name in _LIBRARIES:
        from sg_runtime.backends.trt import TrtBackend
        from sg_runtime.devices.cuda import keep_current

        with keep_current():
            return TrtBackend(bundle, _LIBRARIES[choice.name], choice.number, stream, capture, part)
    from sg_runtime.backends.ort import OrtBackend

    if choice.name == "onnxruntime-cuda" and part is None and bundle.manifest.quantization is not None:
        LOG.warning(
            "%s: on %s, %s graphs are slower than FP16: its kernels widen the values and multiply in the base "
            "precision; build with `precision` fp16, or engines of TensorRT",
            bundle.path,
            choice.name,
            bundle.manifest.precision_name.upper(),
        )
    return OrtBackend(bundle, choice.name, choice.number, stream, capture=capture, threads=threads, part=part)


def check_part(bundle: Bundle, part: PartFacts, name: str) -> None:
    """Raise BundleError for a part in BF16 if the chosen backend, `name`, is the CPU's."""
    if part.precision == "bf16" and name == "onnxruntime-cpu":
        raise BundleError(
            f"{bundle.path}: {part.all_graphs[0].name} is in BF16, which {name} does not run: build it with "
            f"`text_precision` fp32, or give prompt_embeds"
        )


class _NothingForItError(BundleError):
    """The bundle holds no files for this backend.

    Not a fault of the installation, so it is reported last.
    """


def _parse(device: str) -> tuple[str, int]:
    """Split a device name into its kind and number."""
    expect("device", device, str, "auto, cpu, cuda, or cuda:NUMBER")
    match = re.fullmatch(r"(auto|cpu|cuda)(?::([0-9]{1,3}))?", device)
    if match is None or (match[2] and match[1] != "cuda"):
        raise UsageError(f"device {device!r}: expected auto, cpu, cuda, or cuda:NUMBER")
    return match[1], int(match[2] or 0)


def _check(bundle: Bundle, name: str, number: int, batch: int | None) -> None:
    """Raise unless the backend can run the bundle here."""
    if name in _LIBRARIES:
        _check_engines(bundle, _LIBRARIES[name], number, batch)
    else:
        _check_onnx(bundle, name, number)


def _check_engines(bundle: Bundle, library: EngineLibrary, number: int, batch: int | None) -> None:
    from sg_runtime.backends.trt_check import check_engines

    if not any(engine.library == library for engine in bundle.manifest.engines):
        raise _NothingForItError(f"the bundle has no engines of {ENGINE_NAMES[library]}")
    check_engines(bundle, library, batch, number)


def _check_onnx(bundle: Bundle, name: str, number: int) -> None:
    manifest = bundle.manifest
    if any(graph.file is None for graph in manifest.graphs):
        raise _NothingForItError(
            f"{bundle.path}: expected ONNX graphs, found engines alone, which run only on their target GPUs; build "
            f"it with `keep_onnx`, or for the CPU: {build_command(manifest, str(bundle.path), target='onnxruntime')}"
        )
    # The CPU provider has the operators of the form for CUDA in FP32 alone.
    fused = manifest.onnx_target == "onnxruntime-cuda" and manifest.precision != "fp32"
    if name == "onnxruntime-cpu" and fused:
        raise BundleError(
            f"{bundle.path}: its graphs are in the form for ONNX Runtime's CUDA provider in "
            f"{manifest.precision.upper()}, which {name} does not run; build for any provider: "
            f"{build_command(manifest, str(bundle.path), target='onnxruntime')}"
        )
    if name == "onnxruntime-cpu" and manifest.precision == "bf16":
        raise BundleError(
            f"{bundle.path}: its graphs are in BF16, which ONNX Runtime's CPU provider does not run; build it "
            f"with `precision` fp32, or for a GPU with `onnx_target` onnxruntime-cuda or `libraries` tensorrt_rtx"
        )
    if name != "onnxruntime-cpu":
        check_cuda_provider(number)


def _check_provider(name: str, number: int) -> None:
    """Raise unless ONNX Runtime's provider of this backend works here, on GPU `number`."""
    if name == "onnxruntime-cpu":
        require("onnxruntime")
    else:
        check_cuda_provider(number)
