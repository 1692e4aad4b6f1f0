"""What clients may ask for: the body of a request, and the description of a model."""

import re
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sg_export.serving.errors import ApiError
from sg_runtime.errors import UsageError
from sg_runtime.guidance import choose, levels
from sg_runtime.manifest import MODES, Labels, Manifest
from sg_runtime.service import Request

Number = float | tuple[float, float]


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`.

    The fields of OpenAI's interface are model, prompt, n, size, response_format and user; the
    others are ours. seed: seed of the first image; it increases by one per image.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    model: str | None = None
    prompt: str | None = None
    class_: int | str | None = Field(None, alias="class")
    negative: str | None = None
    n: int = 1
    size: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**64)
    response_format: Literal["b64_json"] = "b64_json"
    steps: int | None = None
    sampler: str | None = None
    guidance: str | None = None
    scale: Number | None = None
    sparsity: Number | None = None
    strong_sparsity: Number | None = None
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_format: Literal["png"] = "png"


def parse(body: bytes) -> ImagesRequest:
    """Return the request in a body.

    Raises ApiError: 400 if the body is no JSON object, 422 for the first field that is wrong.
    """
    try:
        return ImagesRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[0]
    message = found["msg"][0].lower() + found["msg"][1:]
    if not found["loc"]:
        raise ApiError(400, "invalid_json", f"body: expected a JSON object, found another content: {message}")
    param = str(found["loc"][0])
    if found["type"] == "extra_forbidden":
        known = ", ".join(field.alias or name for name, field in ImagesRequest.model_fields.items())
        raise ApiError(422, "unknown_field", f"{param}: expected one of {known}", param)
    raise ApiError(422, "invalid_value", f"{param}: {message}, found {found['input']!r:.80}", param)


def runtime_request(manifest: Manifest, asked: ImagesRequest, images: int, steps: int) -> Request:
    """Return what a client asks for as a request of the runtime.

    images, steps: the largest numbers that are allowed. Raises ApiError for fields that exceed
    them or do not fit each other. The class or prompt itself is not checked.
    """
    for param, value, most in (("n", asked.n, images), ("steps", asked.steps, steps)):
        if value is not None and not 1 <= value <= most:
            raise ApiError(422, "invalid_value", f"{param}: expected 1 to {most}, found {value}", param)
    if (asked.prompt is None) == (asked.class_ is None):
        found = "neither" if asked.prompt is None else "both"
        raise ApiError(422, "invalid_value", f"prompt: expected either prompt or class, found {found}", "prompt")
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    # The other values are checked by the runtime, with the values that this bundle has.
    settings: dict[str, Any] = {"sampler": asked.sampler, "guidance": asked.guidance}
    return Request(
        conditions=(_condition(manifest, asked),) * asked.n,
        seeds=tuple((seed + image) % 2**64 for image in range(asked.n)),
        negative=asked.negative,
        size=None if asked.size in (None, "auto") else _size(asked.size),
        steps=asked.steps,
        strong_sparsity=asked.strong_sparsity,
        sparsity=asked.sparsity,
        scale=asked.scale,
        **settings,
    )


def _condition(manifest: Manifest, asked: ImagesRequest) -> int | str:
    """Return the class or the prompt.

    A prompt of a model of classes is the name of a class, or its index if the classes have no
    names.
    """
    known = manifest.model.conditions
    if not isinstance(known, Labels):
        if asked.class_ is not None:
            raise ApiError(
                422, "invalid_value", "class: expected none: the model is conditioned on text: give prompt", "class"
            )
        return asked.prompt or ""
    if asked.class_ is not None:
        return asked.class_
    named = str(asked.prompt).strip()
    return int(named) if known.names is None and re.fullmatch("[0-9]{1,9}", named) else named


def _size(text: str | None) -> tuple[int, int]:
    """Return height and width of a size in OpenAI's form, WIDTHxHEIGHT."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text or "")
    if match is None:
        raise ApiError(
            422, "invalid_value", f"size: expected WIDTHxHEIGHT in pixels, for example 768x512, found {text!r}", "size"
        )
    return int(match[2]), int(match[1])


def described(name: str, manifest: Manifest) -> dict[str, Any]:
    """Return a model as `GET /v1/models` lists it.

    What OpenAI's clients do not know is in `sg_export`.
    """
    known, plan = manifest.model.conditions, manifest.guidance
    classes = (list(known.names) if known.names else known.count) if isinstance(known, Labels) else None
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "sg-export",
        "sg_export": {
            "family": manifest.model.family,
            "precision": manifest.precision_name,
            "classes": classes,
            "sizes": ["{1}x{0}".format(*view.model.size) for view in manifest.views],
            "steps": manifest.sampling.steps,
            "sampler": manifest.sampling.sampler,
            "guidance": plan.mode,
            "scale": plan.scale,
            "sparsity": plan.weak.sparsity,
            "strong_sparsity": plan.strong.sparsity,
            "modes": {mode: found for mode in MODES if (found := _sparsities(manifest, mode)) is not None},
        },
    }


def _sparsities(manifest: Manifest, mode: Any) -> list[float] | None:
    """Return the weak sparsities of a mode that the bundle can run, or None if it lacks the mode.

    The list is empty if the weak branch has no sparsity of its own.
    """
    if MODES[mode].weak_level == "same":
        return [] if _runs(manifest, mode) else None
    network = MODES[mode].weak_network
    built = [level.sparsity for level in levels(manifest, network)]
    return [sparsity for sparsity in built if _runs(manifest, mode, sparsity)] or None


def _runs(manifest: Manifest, mode: Any, sparsity: float | None = None) -> bool:
    try:
        choose(manifest, mode=mode, sparsity=sparsity)
    except UsageError:
        return False
    return True
