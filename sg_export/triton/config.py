"""The text of `config.pbtxt`: what Triton knows of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sg_export.serving.engine import batch_of
from sg_runtime import __version__
from sg_runtime.backends import BACKENDS
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import MANIFEST_FILE, Labels, Manifest
from sg_runtime.manifest.base import choice, number, whole_number

MARK = "# Written by sg-export"
"""Begin of the first line of a configuration that sg-export wrote."""

WARMUP_PROMPT = "prompt"
"""Name of the file in the folder `warmup` with the prompt of the warm-up request."""

Field = str | int | bool | Mapping[str, "Field"] | Sequence["Field"]


class Word(str):
    """A value of the protobuf text format without quotation marks."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a model in Triton.

    batch: number of images of an engine run; None for the largest that the bundle was built for,
        or 4.
    window: seconds for which an image waits for others that can share its run.
    queue: largest number of requests that wait.
    timeout: seconds within which the run of a request must begin.
    max_steps: largest number of steps of a request.
    instances: number of instances, on each GPU or on the CPU.
    device: "auto", "cpu", "cuda" for all GPUs, or a GPU by number, such as "cuda:1".
    backend, threads: see `Pipeline.load`.
    """

    batch: int | None = None
    window: float = 0.005
    queue: int = 64
    timeout: float = 60.0
    max_steps: int = 250
    instances: int = 1
    device: str = "auto"
    backend: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("queue", "max_steps", "instances"):
            if (value := whole_number(name, getattr(self, name))) < 1:
                raise UsageError(f"{name}: expected at least 1, found {value}")
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is not None and whole_number(name, value) < 1:
                raise UsageError(f"{name}: expected at least 1, found {value}")
        if not 0 <= number("window", self.window) <= 60:
            raise UsageError(f"window: expected 0 to 60 seconds, found {self.window:g}")
        if not 1e-6 <= number("timeout", self.timeout) <= 86400:
            raise UsageError(f"timeout: expected above 0 and at most 86400 seconds, found {self.timeout:g}")
        kind, colon, gpu = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not gpu.isdecimal())):
            raise UsageError(f"device: expected auto, cpu, cuda, or a GPU such as cuda:1, found {self.device}")
        if self.backend is not None:
            choice("backend", self.backend, BACKENDS)
            if self.device.startswith("cuda") and self.backend == "onnxruntime-cpu":
                raise UsageError(f"backend: expected one of a GPU for the device {self.device}, found {self.backend}")
            if self.device == "cpu" and self.backend != "onnxruntime-cpu":
                raise UsageError(f"backend: expected onnxruntime-cpu for the device cpu, found {self.backend}")


def model_config(name: str, bundle: Bundle, settings: Settings) -> str:
    """Return the text of `config.pbtxt` of a model. name: name of the model.

    Raises UsageError for a batch that the bundle was not built for.
    """
    manifest = bundle.manifest
    batch = batch_of(bundle, settings.batch)
    batching: dict[str, Field] = {
        "preferred_batch_size": [batch],
        "max_queue_delay_microseconds": round(settings.window * 1e6),
        "default_queue_policy": {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": round(settings.timeout * 1e6),
            "allow_timeout_override": True,
            "max_queue_size": settings.queue,
        },
    }
    on_gpu = uses_gpu(manifest, settings)
    instances: dict[str, Field] = {"count": settings.instances, "kind": Word("KIND_GPU" if on_gpu else "KIND_CPU")}
    if settings.device.startswith("cuda:"):
        instances["gpus"] = [int(settings.device.partition(":")[2])]
    parameters = {
        "precision": precision_of(manifest),
        "created_by": f"sg-export {__version__}",
        "fingerprint": sha256_of(bundle.root / MANIFEST_FILE),
        "batch": str(batch),
        "backend": settings.backend or ("" if on_gpu else "onnxruntime-cpu"),
        "threads": str(settings.threads or ""),
        "max_steps": str(settings.max_steps),
    }
    fields: dict[str, Field] = {
        "name": name,
        "backend": "python",
        "max_batch_size": batch,
        "input": inputs_of(manifest),
        "output": [{"name": "image", "data_type": Word("TYPE_UINT8"), "dims": image_dims(manifest)}],
        "instance_group": [instances],
        "dynamic_batching": batching,
        "model_warmup": [warmup_of(manifest, on_gpu)],
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }
    model = manifest.model
    head = f"{MARK} {__version__}: {model.family}, matmuls in {parameters['precision']}. Change it by sg-export triton."
    return "\n".join([head, *_lines(fields), ""])


def uses_gpu(manifest: Manifest, settings: Settings) -> bool:
    """Whether the instances are on GPUs.

    By default those of engines and of graphs for ONNX Runtime's CUDA provider are.
    """
    if settings.device != "auto":
        return settings.device != "cpu"
    if settings.backend is not None:
        return settings.backend != "onnxruntime-cpu"
    return bool(manifest.engines) or manifest.onnx_target == "onnxruntime-cuda"


def precision_of(manifest: Manifest) -> str:
    """Return the precision of the matmuls, as int8 over fp16."""
    if manifest.quantization is None:
        return manifest.precision
    return f"{manifest.quantization.type} over {manifest.precision}"


def inputs_of(manifest: Manifest) -> list[Field]:
    """Return the inputs of the model, each of one value for an image."""
    known = manifest.model.conditions
    if not isinstance(known, Labels):
        texts = [("prompt", "TYPE_STRING", False), ("negative", "TYPE_STRING", True)]
    elif known.names is None:
        texts = [("class", "TYPE_INT64", False)]
    else:
        texts = [("class", "TYPE_INT64", True), ("class_name", "TYPE_STRING", True)]
    return [
        {"name": name, "data_type": Word(kind), "dims": [1], **({"optional": True} if optional else {})}
        for name, kind, optional in [*texts, ("seed", "TYPE_UINT64", False)]
    ]


def image_dims(manifest: Manifest) -> list[Field]:
    """Return height, width and channels of an image; -1 for sides that differ between sizes."""
    sizes = [view.model.size for view in manifest.views]
    channels = 3 if manifest.decode_graph is not None else manifest.model.latent[0]
    height, width = (sides[0] if len(set(sides)) == 1 else -1 for sides in zip(*sizes, strict=True))
    return [height, width, channels]


def warmup_of(manifest: Manifest, on_gpu: bool) -> Field:
    """Return the warm-up request: one image of the bundle's steps. A GPU gets it twice."""
    if isinstance(manifest.model.conditions, Labels):
        condition: dict[str, Field] = {"data_type": Word("TYPE_INT64"), "dims": [1], "zero_data": True}
    else:
        condition = {"data_type": Word("TYPE_STRING"), "dims": [1], "input_data_file": WARMUP_PROMPT}
    name = "class" if isinstance(manifest.model.conditions, Labels) else "prompt"
    seed: dict[str, Field] = {"data_type": Word("TYPE_UINT64"), "dims": [1], "zero_data": True}
    inputs: list[Field] = [{"key": name, "value": condition}, {"key": "seed", "value": seed}]
    # The first run on a GPU compiles kernels, the second captures CUDA graphs.
    return {"name": "one image", "batch_size": 1, "count": 2 if on_gpu else 1, "inputs": inputs}


def _lines(fields: Mapping[str, Field], indent: str = "") -> list[str]:
    """Return the lines of a message in the protobuf text format. Lists are repeated fields."""
    lines = []
    for name, value in fields.items():
        for one in [value] if isinstance(value, (str, int, Mapping)) else value:
            if isinstance(one, Mapping):
                lines += [f"{indent}{name} {{", *_lines(one, f"{indent}  "), f"{indent}}}"]
            else:
                lines.append(f"{indent}{name}: {_value(one)}")
    return lines


def _value(value: Field) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, Word)):
        return str(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
