"""The job of sampling many images: which image has which class or prompt, seed and shard."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from sg_runtime.bundle import Bundle
from sg_runtime.conditions import class_index
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.guidance import PlanChanges
from sg_runtime.host import usable_cores
from sg_runtime.manifest import MANIFEST_FILE, GuidancePlan, Labels, SamplerName
from sg_runtime.manifest.base import Strict, check_counts, choice, whole_number
from sg_runtime.pipeline import Pipeline
from sg_runtime.requests import checked_prompts, checked_seeds
from sg_runtime.run.encode import PromptEncoder
from sg_runtime.run.opened import Keep
from sg_runtime.sampling import SAMPLERS, Churn

Format = Literal["png", "webdataset", "npz"]
"""Forms of the images: PNG files, tar shards of WebDataset, or one .npz file."""
FORMATS: tuple[Format, ...] = get_args(Format)

SHARD_IMAGES, SHARD_BYTES = 512, 256 << 20
"""Images, and bytes of pixels, of a shard by default; the smaller number of images counts."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for. `plan` makes it a job.

    bundle: path of the bundle.
    count: number of images.
    classes: classes by index or name, which the images take in turn; by default all. One that is
        named twice counts once.
    prompts: prompts of a model with text, which the images take in turn.
    negative: prompt of the weak branch; by default no prompt.
    seed: seed of the first image; it increases by one per image.
    size: height and width of the picture; by default the bundle's first.
    steps, sampler, churn: see `Pipeline.sample`.
    guidance: parts of the bundle's guidance plan to replace.
    format: one of FORMATS.
    shard: images in a shard; by default about 512, a multiple of the batch.
    device, backend, batch, threads, keep: see `Pipeline.load`.
    manifest: SHA-256 that the bundle's manifest must have; None for any.
    """

    bundle: Path
    count: int
    classes: Sequence[int | str] = ()
    prompts: Sequence[str] = ()
    negative: str | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    steps: int | None = None
    sampler: SamplerName | None = None
    churn: Churn | None = None
    guidance: PlanChanges = field(default_factory=PlanChanges)
    format: Format = "png"
    shard: int | None = None
    device: str = "auto"
    backend: str | None = None
    batch: int | None = None
    threads: int | None = None
    keep: Keep = "all"
    manifest: str | None = None

    def continuing(self, job: "Job | None") -> "Request":
        """Return the request for the bundle of a job that has begun.

        What the request leaves open about the machine is that of the job, too.
        """
        if job is None:
            return self
        return replace(
            self,
            shard=job.shard if self.shard is None else self.shard,
            backend=job.backend if self.backend is None else self.backend,
            batch=job.batch if self.batch is None else self.batch,
            threads=job.threads if self.threads is None else self.threads,
            manifest=job.bundle,
        )

    def load(self) -> tuple[Pipeline, str]:
        """Return the pipeline, and the SHA-256 of the bundle's manifest.

        The manifest holds the hashes of all files. Raises BundleError if it is not the one of the
        job, and the errors of `Pipeline.load`.
        """
        before = bundle_hash(self.bundle)
        if self.manifest not in (None, before):
            raise BundleError(
                f"{self.bundle}: expected the bundle that the job began with, of manifest {self.manifest[:12]}…, found "
                f"{before[:12]}…: restore that bundle, or give another `output`"
            )
        threads = usable_cores() if self.threads is None else self.threads
        pipe = Pipeline.load(
            self.bundle, self.device, backend=self.backend, batch=self.batch, threads=threads, keep=self.keep
        )
        if bundle_hash(self.bundle) != before:
            raise BundleError(f"{self.bundle}: changed while it was read: try again when the bundle is complete")
        return pipe if self.size is None else pipe.at(*self.size), before


@dataclass(frozen=True, slots=True)
class Job(Strict):
    """All that the images of a job depend on. Image k is a function of the job and of k.

    schema_version: version of the job's file.
    bundle: SHA-256 of the bundle's manifest.
    size: height and width of the picture.
    shape: height, width and channels of the pixels.
    count: number of images.
    seed: seed of the first image.
    classes: classes by index, which the images take in turn; None for a model with text.
    prompts: prompts that the images take in turn; None for a model with classes.
    negative: prompt of the weak branch, "" for no prompt; None if it takes the image's own.
    guidance: guidance plan.
    steps: sampling steps.
    sampler: sampler.
    churn: noise added in every step; None for none.
    format: form of the images.
    shard: images in a shard.
    batch: images in every run of a graph; a run of fewer is filled up.
    backend: backend that runs the bundle.
    threads: threads of a run on the CPU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {**Strict.__pydantic_config__, "ser_json_inf_nan": "constants"}

    schema_version: Literal[1]
    bundle: str
    size: tuple[int, int]
    shape: tuple[int, int, int]
    count: int
    seed: int
    classes: tuple[int, ...] | None
    prompts: tuple[str, ...] | None
    negative: str | None
    guidance: GuidancePlan
    steps: int
    sampler: SamplerName
    churn: Churn | None
    format: Format
    shard: int
    batch: int
    backend: str
    threads: int

    def __post_init__(self) -> None:
        check_counts(self, 1, "count", "steps", "shard", "batch", "threads")
        checked_seeds([self.seed])
        choice("format", self.format, FORMATS)
        choice("sampler", self.sampler, SAMPLERS)
        if not re.fullmatch("[0-9a-f]{64}", self.bundle):
            raise UsageError(f"bundle: expected a SHA-256, found {self.bundle!r}")
        if not (self.classes or self.prompts):
            raise UsageError("classes: expected classes or prompts, found none")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard)

    def images(self, shard: int) -> range:
        """Return the numbers of a shard's images."""
        return range(shard * self.shard, min(self.count, (shard + 1) * self.shard))

    def condition(self, image: int) -> int | str:
        """Return the class or the prompt of an image."""
        found: Sequence[int | str] = self.classes or self.prompts or ()
        return found[image % len(found)]

    def seed_of(self, image: int) -> int:
        """Return the seed of an image; the last seed is followed by the first."""
        return (self.seed + image) % 2**64

    def name(self, image: int) -> str:
        """Return the number of an image, with as many digits as all of the job, at least six."""
        return f"{image:0{max(6, len(str(self.count - 1)))}}"

    def facts(self, image: int) -> dict[str, Any]:
        """Return what an image was made of: its number, seed, and class or prompt."""
        kind = "class" if self.classes else "prompt"
        return {"image": image, "seed": self.seed_of(image), kind: self.condition(image)}

    def differences(self, other: "Job") -> list[str]:
        """Return in words each field in which another job differs from this one."""
        found = []
        for name in (facts.name for facts in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                long = max(len(str(ours)), len(str(theirs))) > 80
                found.append(f"other {name}" if long else f"{name} {theirs} in place of {ours}")
        return found


def bundle_hash(bundle: Path) -> str:
    """Return the SHA-256 of a bundle's manifest. Raises BundleError if there is no bundle."""
    try:
        return sha256_of(bundle / MANIFEST_FILE)
    except OSError:
        Bundle.open(bundle)  # says what is there instead
        raise


def plan(request: Request, pipe: Pipeline, bundle: str) -> Job:
    """Return the job of a request.

    pipe, bundle: what `Request.load` returned.

    Raises UsageError if the bundle cannot serve the request, before any image is sampled.
    """
    manifest = pipe.bundle.manifest
    if not pipe.gives_images:
        raise UsageError(
            f"{pipe.bundle.path}: expected a bundle that gives images, found one that samples latents and holds no "
            f"decoder: build it with `vae` FOLDER"
        )
    classes = prompts = None
    guidance = request.guidance.of(manifest)
    negative = request.negative
    if isinstance(manifest.model.conditions, Labels):
        if request.prompts or negative is not None:
            raise UsageError("prompts: expected none: the model is conditioned on classes: give `classes`")
        labels = manifest.model.conditions
        classes = tuple(dict.fromkeys(class_index(labels, name) for name in request.classes or range(labels.count)))
    else:
        if request.classes:
            raise UsageError("classes: expected none: the model is conditioned on text: give `prompt_file`")
        if not request.prompts:
            raise UsageError("prompts: expected some, since the model is conditioned on text: give `prompt_file`")
        prompts = tuple(checked_prompts("prompts", request.prompts))
        negative = "" if negative is None and guidance.row.null_weak else negative
        PromptEncoder(pipe.bundle).clean([*prompts, *checked_prompts("negative", negative or "", empty=True)])
    if request.churn is not None and manifest.model.prediction != "edm":
        raise UsageError(f"churn: expected an edm model, found a model of {manifest.model.prediction}")
    sampling = manifest.sampling
    count = whole_number("count", request.count)
    shape = _shape(pipe)
    if request.format != "npz" and shape[2] not in (1, 3):
        raise UsageError(f"format {request.format}: a PNG has 1 or 3 channels, found {shape[2]}: give `format` npz")
    return Job(
        1,
        bundle,
        manifest.model.size,
        shape,
        count,
        request.seed,
        classes,
        prompts,
        negative,
        guidance,
        sampling.steps if request.steps is None else request.steps,
        sampling.sampler if request.sampler is None else request.sampler,
        request.churn,
        request.format,
        usual_shard(shape, pipe.batch) if request.shard is None else request.shard,
        pipe.batch,
        pipe.backend.name,
        usable_cores() if request.threads is None else request.threads,
    )


def usual_shard(shape: tuple[int, int, int], batch: int) -> int:
    """Return the number of images of a shard by default, a multiple of the batch.

    shape: height, width and channels.
    """
    height, width, channels = shape
    most = min(SHARD_IMAGES, SHARD_BYTES // (height * width * channels))
    return max(1, most // batch) * batch


def _shape(pipe: Pipeline) -> tuple[int, int, int]:
    """Return height, width and channels of the pictures of a pipeline."""
    manifest = pipe.bundle.manifest
    if manifest.model.space == "pixel":
        channels, height, width = manifest.model.latent
    else:
        assert manifest.decode_graph is not None
        _, channels, height, width = (int(side) for side in manifest.decode_graph.outputs[0].shape)
    return height, width, channels
