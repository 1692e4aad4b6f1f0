"""A request for images, and what decides whether images can share an engine run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sg_runtime.conditions import class_index
from sg_runtime.errors import UsageError
from sg_runtime.guidance import Ramp, choose
from sg_runtime.manifest import GuidanceMode, GuidancePlan, Labels, Manifest, SamplerName
from sg_runtime.manifest.base import choice, whole_number
from sg_runtime.requests import checked_prompts, checked_seeds
from sg_runtime.sampling import SAMPLERS


@dataclass(frozen=True, slots=True)
class Request:
    """Images that one caller asks for.

    conditions: class of each image (index, name, or None for no class), or its prompt.
    seeds: seed of each image, 0 to 2**64 - 1.
    negative: prompt of the weak branch, for the guidance cfg and cfg+sg; None for no prompt.
    size: height and width of the picture in pixels; None for the bundle's first.
    steps, sampler: None for those of the bundle.
    guidance: guidance mode. It, sparsities and scale are those of `Pipeline.guidance`.
    strong_sparsity: sparsity of the strong branch.
    sparsity: sparsity of the weak branch.
    scale: guidance scale.
    """

    conditions: tuple[int | str | None, ...]
    seeds: tuple[int, ...]
    negative: str | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    sampler: SamplerName | None = None
    guidance: GuidanceMode | None = None
    strong_sparsity: Ramp | None = None
    sparsity: Ramp | None = None
    scale: Ramp | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """What the images of one engine run have in common.

    size: height and width of the picture in pixels, or of a sample if its pixels are unknown.
    """

    size: tuple[int, int]
    steps: int
    sampler: SamplerName
    guidance: GuidancePlan


class FieldError(UsageError):
    """A field of a request is wrong. field: name of the field of `Request`."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def _field(name: str) -> Iterator[None]:
    """Turn a UsageError of the block into a FieldError of this field."""
    try:
        yield
    except FieldError:
        raise
    except UsageError as error:
        raise FieldError(str(error), name) from None


def checked(manifest: Manifest, request: Request) -> Group:
    """Return the group of a request. Raises FieldError if the bundle cannot serve the request.

    It opens no graph and runs none. A prompt may still be refused when it is cleaned.
    """
    with _field("conditions"):
        _check_conditions(manifest, request)
    with _field("seeds"):
        checked_seeds(request.seeds, len(request.conditions))
    with _field("size"):
        view = manifest if request.size is None else manifest.at(*request.size)
    with _field("steps"):
        steps = view.sampling.steps if request.steps is None else whole_number("steps", request.steps)
        if steps < 1:
            raise UsageError(f"steps: expected at least 1, found {steps}")
    with _field("sampler"):
        sampler = choice("sampler", request.sampler or view.sampling.sampler, SAMPLERS)
    with _field("guidance"):
        plan = choose(
            view,
            mode=request.guidance,
            strong_sparsity=request.strong_sparsity,
            sparsity=request.sparsity,
            scale=request.scale,
        )
    if request.negative is not None and not plan.row.null_weak:
        raise FieldError(
            f"negative: expected none in the guidance {plan.mode}, found one: it is for cfg and cfg+sg", "negative"
        )
    return Group(view.model.size, steps, sampler, plan)


def _check_conditions(manifest: Manifest, request: Request) -> None:
    """Raise UsageError unless the model knows each condition of the request."""
    known = manifest.model.conditions
    if isinstance(known, Labels):
        if request.negative is not None:
            raise FieldError("negative: expected none: the model is conditioned on classes", "negative")
        for name in request.conditions:
            class_index(known, name)
    else:
        checked_prompts("prompt", list(request.conditions))
        if request.negative is not None:
            with _field("negative"):
                checked_prompts("negative", request.negative, empty=True)
