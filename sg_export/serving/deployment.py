"""Engines on Ray Serve: each bundle is an application whose replicas hold a service each."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sg_export.serving.engine import DEFAULT_BATCH, LocalEngine, Reply, check_servable
from sg_export.serving.logs import log
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, DeadlineError, DeviceError, QueueFullError, RefusedError, SgError, UsageError
from sg_runtime.extras import require
from sg_runtime.files import sha256_of
from sg_runtime.manifest import MANIFEST_FILE
from sg_runtime.ray_host import keep_ray_private, starting_ray
from sg_runtime.service import Request, Service, ServiceSettings, Statistics

TRIES = 4
"""Number of replicas that a request is given to, if each of them dies with it."""

GRACE_SECONDS = 30.0
"""Seconds after the deadline of a request for which its last run may take."""

CHECK_SECONDS = 2.0
"""Seconds between two checks of a replica by Ray Serve."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Settings of the replicas of a server.

    service: settings of the service in each replica.
    replicas: least and largest number of replicas of a bundle. Between them, Ray Serve starts and
        stops replicas as requests come.
    device, backend, batch, threads: see `Pipeline.load`.
    gpus: GPUs that Ray reserves for a replica, perhaps a fraction; None for one if Ray finds any
        and the device is not "cpu".
    """

    service: ServiceSettings
    replicas: tuple[int, int] = (1, 1)
    device: str = "auto"
    backend: str | None = None
    batch: int | None = None
    threads: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        least, most = self.replicas
        if not 1 <= least <= most:
            raise UsageError(
                f"replicas: expected a least number of at least 1 and no larger most, found {least}:{most}"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"device: expected auto, cpu or cuda, since Ray chooses the GPU of a replica, found {self.device}"
            )
        if self.gpus is not None and self.gpus < 0:
            raise UsageError(f"gpus: expected at least 0, found {self.gpus:g}")

    @property
    def cpus(self) -> int:
        """Cores that Ray reserves for a replica."""
        return self.threads or 1


class Replica:
    """A service over one bundle, as an actor of Ray Serve. Errors of requests are results."""

    def __init__(self, path: str, fingerprint: str, settings: ReplicaSettings) -> None:
        """Open the bundle and run it once.

        Raises BundleError if it is not the one of the server.
        """
        from sg_runtime.pipeline import Pipeline

        found = sha256_of(Path(path) / MANIFEST_FILE)
        if found != fingerprint:
            raise BundleError(
                f"{path}: expected the bundle that the server started with (manifest {fingerprint[:12]}…), found "
                f"another one ({found[:12]}…): start the server again"
            )
        pipe = Pipeline.load(
            path, settings.device, backend=settings.backend, batch=settings.batch, threads=settings.threads
        )
        if settings.batch is None and pipe.bundle.manifest.batch is None and pipe.backend.batches is None:
            pipe.batch = DEFAULT_BATCH
        on_cpu = pipe.backend.name == "onnxruntime-cpu"
        pipe.warmup(pipe.batch if settings.service.pad else 1, steps=1 if on_cpu else None)
        self._service = Service(pipe, settings.service)
        self._engine = LocalEngine("", pipe.bundle, self._service)

    async def generate(self, request: Request, timeout: float) -> Reply | SgError:
        """Return the images of a request, or its error."""
        try:
            return await self._engine.generate(request, timeout)
        except SgError as error:
            return error

    async def check(self) -> SgError | None:
        """Return the error with which every request would end."""
        try:
            self._service.check()
        except SgError as error:
            return error
        return None

    async def statistics(self) -> Statistics:
        """Return what the service has done."""
        return self._service.statistics()

    async def check_health(self) -> None:
        """Raise an error if another replica could serve better, so that Ray Serve starts one.

        A bundle that was replaced stays replaced, so it is not such an error.
        """
        with suppress(BundleError):
            self._service.check()

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()


class RayEngine:
    """An engine over the replicas of a bundle.

    If a replica dies, its requests go to another one.
    """

    def __init__(self, name: str, bundle: Bundle, handle: Any) -> None:
        self.name, self.bundle = name, bundle
        self._handle = handle

    async def generate(self, request: Request, timeout: float) -> Reply:
        """Return the images of a request; see `Engine`.

        A request may run again, because its images depend on nothing but the request.
        """
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        end = time.monotonic() + timeout
        for tried in range(1, TRIES + 1):
            left = max(end - time.monotonic(), 0.001)
            response = self._handle.generate.remote(request, left)
            try:
                found = await asyncio.wait_for(response, left + GRACE_SECONDS)
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (asyncio.TimeoutError, TimeoutError):
                response.cancel()
                raise DeadlineError(
                    f"{self.name}: expected an answer within {timeout + GRACE_SECONDS:g} s, found none: try again later"
                ) from None
            except BackPressureError as error:
                raise QueueFullError(f"{self.name}: expected room in the queue, found none ({error})") from None
            except DeploymentUnavailableError as error:
                raise RefusedError(f"{self.name}: expected a replica, found none ({error})") from None
            except RayActorError as error:
                log(logging.WARNING, "replica lost", model=self.name, tried=tried, error=str(error).partition("\n")[0])
                continue
            except RayTaskError as error:
                log(logging.ERROR, "replica failed", model=self.name, error=str(error))
                raise
            if isinstance(found, SgError):
                raise found
            reply: Reply = found
            return reply
        raise DeviceError(f"{self.name}: expected a replica that answers, found {TRIES} that ended: see Ray's logs")

    async def check(self) -> None:
        """Raise SgError if no replica can serve requests."""
        found = await self._each("check")
        if not found:
            raise RefusedError(
                f"{self.name}: expected a replica that runs, found none: wait until Ray Serve starts one"
            )
        if all(found):
            raise found[0]

    async def statistics(self) -> list[Statistics]:
        """Return the statistics of every replica that answers."""
        return await self._each("statistics")

    async def _each(self, method: str) -> list[Any]:
        """Return the results of a method of every replica. Replicas that die are left out."""
        try:
            found = await self._handle.broadcast(method).results_async(timeout_s=CHECK_SECONDS, return_exceptions=True)
        except Exception as error:  # Ray has no common class for what goes wrong with replicas
            log(logging.DEBUG, "no replica answered", model=self.name, error=repr(error))
            return []
        return [result for result in found if not isinstance(result, BaseException) or isinstance(result, SgError)]


def named(bundles: Sequence[Path]) -> dict[str, Bundle]:
    """Open bundles and return them by the names of their folders.

    Raises UsageError if two have one name, or if one gives no pictures.
    """
    found: dict[str, Bundle] = {}
    for path in bundles:
        bundle = Bundle.open(path)
        check_servable(bundle)
        name = bundle.root.resolve().name
        if name in found:
            raise UsageError(
                f"{path}: expected bundles with names of their own, found two named {name}: rename one of the folders"
            )
        found[name] = bundle
    return found


@contextmanager
def deployed(
    bundles: Mapping[str, Bundle], settings: ReplicaSettings, cluster: str | None = None
) -> Iterator[list[RayEngine]]:
    """Start Ray and an application for each bundle. Yield their engines, in order.

    cluster: address of a running cluster of Ray; by default Ray runs on this machine alone, and
    ends with the block. Raises SgError if a bundle cannot be served.
    """
    _keep_to_itself(cluster is None)
    require("ray")
    import ray
    from ray import serve

    applications = {f"sg-export-{name}": bundle for name, bundle in bundles.items()}
    try:
        _start(len(bundles), settings, cluster)
        serve.start(proxy_location="Disabled")
        deployment = _deployment(settings, ray.cluster_resources().get("GPU", 0.0))
        engines = []
        for (application, bundle), name in zip(applications.items(), bundles, strict=True):
            fingerprint = sha256_of(bundle.root / MANIFEST_FILE)
            handle = _running(application, deployment.bind(str(bundle.root), fingerprint, settings))
            engines.append(RayEngine(name, bundle, handle))
        yield engines
    finally:
        if ray.is_initialized():
            with suppress(Exception):  # a part of Ray has ended already
                for application in applications:
                    serve.delete(application)
                if cluster is None:
                    serve.shutdown()
            ray.shutdown()


def _keep_to_itself(alone: bool) -> None:
    """Make Ray report no usage and write no logs here. It must not be imported yet.

    alone: whether Ray runs on this machine alone. Then its ports are those of the loopback
    interface, except one of each replica, and all of them ask for a new token.
    """
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    if keep_ray_private(alone) and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _start(bundles: int, settings: ReplicaSettings, cluster: str | None) -> None:
    """Connect to a cluster, or start Ray on this machine."""
    import ray

    # Ray counts cores, but does not bind replicas to them: it may count more than there are.
    cores = max(os.cpu_count() or 1, bundles * settings.replicas[1] * settings.cpus + 1)
    local = {
        "address": "local",
        "num_cpus": cores,
        "include_dashboard": False,
        "object_store_memory": 256 << 20,
    }
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with starting_ray():
        ray.init(**({"address": cluster} if cluster else local), logging_level="ERROR", log_to_driver=False)


def _deployment(settings: ReplicaSettings, found: float) -> Any:
    """Return the deployment of a bundle's replicas. found: number of GPUs that Ray has."""
    from ray import serve

    least, most = settings.replicas
    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if found and settings.device != "cpu" else 0.0
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                # A replica has work if one batch runs and one waits.
                "target_ongoing_requests": 2 * (settings.batch or DEFAULT_BATCH),
                "upscale_delay_s": 5.0,
                "downscale_delay_s": 120.0,
            }
        }
    queue = settings.service.queue
    return serve.deployment(
        Replica,
        name="replica",
        # The service refuses what its queue has no room for. Ray would count requests, not images.
        max_ongoing_requests=2 * queue + 64,
        max_queued_requests=queue,
        health_check_period_s=CHECK_SECONDS,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": gpus},
        **scaling,
    )


def _running(name: str, application: Any) -> Any:
    """Run an application of Ray Serve and return its handle.

    Raises DeviceError if no replica starts.
    """
    from ray import serve

    try:
        return serve.run(application, name=name, route_prefix=None, logging_config={"encoding": "JSON"})
    except RuntimeError as error:
        status = serve.status().applications.get(name)
        told = [str(error)] if status is None else [found.message for found in status.deployments.values()]
        last = [line.strip() for line in "\n".join(told).splitlines() if line.strip()]
        reason = next((line for line in reversed(last) if "Error: " in line), last[-1] if last else "no reason")
        raise DeviceError(f"{name}: expected a replica that starts, found none: {reason}") from None
