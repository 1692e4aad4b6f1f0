"""What the HTTP application asks for images: a service of the runtime, here or in a replica."""

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.images import png_bytes
from sg_runtime.service import Parts, Request, Service, Statistics

DEFAULT_BATCH = 4
"""Number of images of a run if neither the user nor the bundle says it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The images of a request as PNG files.

    images: contents of the files, in the order of its seeds.
    parts: seconds that the service took.
    png: seconds that their encoding took.
    led: see `Answer`.
    """

    images: tuple[bytes, ...]
    parts: Parts
    png: float
    led: tuple[int, ...]


class Engine(Protocol):
    """Gives images of one bundle.

    name: name of the model for clients.
    bundle: the bundle; it may be open elsewhere.
    """

    name: str
    bundle: Bundle

    async def generate(self, request: Request, timeout: float) -> Reply:
        """Return the images of a request. If the call is cancelled, so is the request.

        timeout: seconds within which its last run must begin. Raises SgError.
        """
        ...

    async def check(self) -> None:
        """Raise SgError if no request can be served now."""
        ...

    async def statistics(self) -> list[Statistics]:
        """Return what each service of the engine has done since it started."""
        ...


def check_servable(bundle: Bundle) -> None:
    """Raise UsageError if a bundle does not give pictures that a PNG can hold."""
    model = bundle.manifest.model
    if bundle.manifest.decode_graph is None and (model.space != "pixel" or model.latent[0] not in (1, 3)):
        raise UsageError(
            f"{bundle.path}: expected a bundle that gives pictures of 1 or 3 channels, found samples of "
            f"{model.latent[0]} channels in {model.space} space and no decoder: build it with `vae` FOLDER"
        )


def batch_of(bundle: Bundle, wanted: int | None) -> int:
    """Return the number of images of a run. Raises UsageError if the bundle has no such batch."""
    manifest = bundle.manifest
    built = manifest.engine_batches() if manifest.engines else () if manifest.batch is None else (manifest.batch,)
    if wanted is not None and built and wanted not in built:
        raise UsageError(
            f"batch: expected one of those that {bundle.path} was built for ({', '.join(map(str, built))}), found "
            f"{wanted}"
        )
    return wanted or max(built, default=DEFAULT_BATCH)


class LocalEngine:
    """An engine over a service in this process."""

    def __init__(self, name: str, bundle: Bundle, service: Service) -> None:
        self.name, self.bundle, self.service = name, bundle, service

    async def generate(self, request: Request, timeout: float) -> Reply:
        """Return the images of a request; see `Engine`."""
        answer = await asyncio.wrap_future(self.service.submit(request, timeout=timeout))
        began = time.monotonic()
        images = await asyncio.to_thread(lambda: tuple(png_bytes(image) for image in answer.images))
        return Reply(images, answer.parts, time.monotonic() - began, answer.led)

    async def check(self) -> None:
        """Raise SgError if no request can be served now."""
        self.service.check()

    async def statistics(self) -> list[Statistics]:
        """Return the statistics of the service."""
        return [self.service.statistics()]
