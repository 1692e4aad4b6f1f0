"""Engines on Ray Serve: each bundle is an application whose replicas hold a service each."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sg_export.serving.engine import LocalEngine, Reply, batch_of, check_servable
from sg_export.serving.logs import log
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, DeadlineError, DeviceError, QueueFullError, RefusedError, SgError, UsageError
from sg_runtime.extras import require
from sg_runtime.manifest import Manifest
from sg_runtime.ray_host import Need, connect, keep_ray_private, nodes_of
from sg_runtime.service import Request, Service, ServiceSettings, Statistics

TRIES = 4
"""Number of replicas that a request is given to, if each of them dies with it."""

CHECK_SECONDS = 2.0
"""Seconds between two checks of a replica by Ray Serve, and the time limit of our own questions."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Settings of the replicas of a server.

    service: settings of the service in each replica.
    replicas: least and largest number of replicas of a bundle. Between them, Ray Serve starts and
        stops replicas as requests come.
    device, backend, threads: see `Pipeline.load`.
    batch: number of images of a run; None for the largest that the bundle was built for, or 4.
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

    def __init__(self, path: str, manifest: Manifest, settings: ReplicaSettings) -> None:
        """Open the bundle and run it once.

        manifest: the manifest that the server has read. It holds the hashes of all files.

        Raises BundleError if the bundle has another manifest.
        """
        from sg_runtime.pipeline import Pipeline

        pipe = Pipeline.load(
            path, settings.device, backend=settings.backend, batch=settings.batch, threads=settings.threads
        )
        if pipe.bundle.manifest != manifest:
            raise BundleError(
                f"{path}: expected the bundle that the server started with, found another one: start the server again"
            )
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
                # A replica must take it in time. How long its runs take is another matter.
                await asyncio.wait_for(response._to_object_ref(), left)
                found = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (asyncio.TimeoutError, TimeoutError):
                response.cancel()
                raise DeadlineError(
                    f"{self.name}: expected a replica within {timeout:g} s, found none: try again later"
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
        """Raise SgError if the replica that is asked cannot serve requests, or if none answers."""
        response = self._handle.check.remote()
        try:
            found = await asyncio.wait_for(response, CHECK_SECONDS)
        except Exception:  # Ray has no common class for what goes wrong with replicas
            response.cancel()
            raise RefusedError(
                f"{self.name}: expected a replica that runs, found none: wait until Ray Serve starts one"
            ) from None
        if found is not None:
            raise found

    async def statistics(self) -> list[Statistics]:
        """Return the statistics of every replica; none if one does not answer."""
        try:
            found = await self._handle.broadcast("statistics").results_async(
                timeout_s=CHECK_SECONDS, return_exceptions=True
            )
        except Exception as error:
            log(logging.DEBUG, "no statistics", model=self.name, error=repr(error))
            return []
        return [result for result in found if isinstance(result, Statistics)]


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
    ends with the block. Raises UsageError for a batch that a bundle was not built for, or if Ray
    has no room for the replicas, and DeviceError if no cluster answers or no replica starts.
    """
    batches = {name: batch_of(bundle, settings.batch) for name, bundle in bundles.items()}
    _keep_to_itself(cluster is None)
    require("ray")
    import ray
    from ray import serve

    applications = [f"sg-export-{name}" for name in bundles]
    try:
        _start(ray, len(bundles), settings, cluster)
        need = _need(settings, ray.cluster_resources().get("GPU", 0.0))
        _check_room(need, len(bundles) * settings.replicas[0], need.workers(nodes_of(ray)))
        serve.start(proxy_location="Disabled")
        engines = []
        for application, (name, bundle) in zip(applications, bundles.items(), strict=True):
            own = replace(settings, batch=batches[name])
            bound = _deployment(own, need).bind(str(bundle.root), bundle.manifest, own)
            engines.append(RayEngine(name, bundle, _running(application, bound)))
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


def _start(ray: Any, bundles: int, settings: ReplicaSettings, cluster: str | None) -> None:
    """Connect to a cluster, or start Ray on this machine."""
    # Ray counts cores, but does not bind replicas to them: it may count more than there are.
    cores = max(os.cpu_count() or 1, bundles * settings.replicas[1] * settings.cpus + 1)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    connect(ray, cluster or "", num_cpus=cores, include_dashboard=False, object_store_memory=256 << 20)


def _need(settings: ReplicaSettings, found: float) -> Need:
    """Return what Ray reserves for a replica. found: number of GPUs that Ray has."""
    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if found and settings.device != "cpu" else 0.0
    return Need(settings.cpus, gpus)


def _check_room(need: Need, wanted: int, room: int) -> None:
    """Raise UsageError if Ray has no room for the replicas. It would wait for it without end."""
    if room < wanted:
        raise UsageError(
            f"replicas: expected room in Ray for {wanted} with {need} each, found room for {room}: lower `replicas` or "
            f"`gpus`, or serve fewer bundles"
        )


def _deployment(settings: ReplicaSettings, need: Need) -> Any:
    """Return the deployment of the replicas of a bundle, whose batch the settings have."""
    from ray import serve

    least, most = settings.replicas
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                # A replica has work if one batch runs and one waits.
                "target_ongoing_requests": 2 * (settings.batch or 1),
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
        ray_actor_options={"num_cpus": need.cpus, "num_gpus": need.gpus},
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
