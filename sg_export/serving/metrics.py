"""Metrics of a server for Prometheus."""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sg_export.serving.engine import Reply
from sg_runtime.service import PARTS, Statistics

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts requests, images and seconds. Every server has its own."""

    def __init__(self, models: Iterable[str]) -> None:
        """Begin at 0. models: names of all models, so that each has its rows from the start."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sg_requests", "Requests for images, by status.", ["model", "status"], registry=self.registry
        )
        self.images = Counter("sg_images", "Images in responses.", ["model"], registry=self.registry)
        self.seconds = Histogram(
            "sg_request_seconds",
            "Seconds of a request by part: wait, encode, sample, decode, png, and total.",
            ["model", "part"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.runs = Histogram(
            "sg_run_images",
            "Images of an engine run, without padding.",
            ["model"],
            buckets=IMAGES,
            registry=self.registry,
        )
        self.progress = Gauge(
            "sg_images_in_progress",
            "Images that the server has accepted and not answered.",
            ["model"],
            registry=self.registry,
        )
        self.queued = Gauge("sg_queue_images", "Images that wait in replicas.", ["model"], registry=self.registry)
        self.replicas = Gauge("sg_replicas", "Replicas that run.", ["model"], registry=self.registry)
        self.made = Gauge(
            "sg_replica_images",
            "Images that the replicas have made since they started, also for clients that went away.",
            ["model"],
            registry=self.registry,
        )
        for model in models:
            self.images.labels(model)
            self.progress.labels(model)
            self.runs.labels(model)

    def answered(self, model: str, reply: Reply, total: float) -> None:
        """Count a request that was answered. total: its seconds from its arrival."""
        self.images.labels(model).inc(len(reply.images))
        parts = {name: getattr(reply.parts, name) for name in PARTS} | {"png": reply.png, "total": total}
        for name, seconds in parts.items():
            self.seconds.labels(model, name).observe(seconds)
        for size in reply.led:
            self.runs.labels(model).observe(size)

    def text(self, statistics: Mapping[str, Sequence[Statistics]]) -> bytes:
        """Return all metrics in Prometheus' text form. statistics: of each model's replicas."""
        for model, found in statistics.items():
            self.replicas.labels(model).set(len(found))
            self.queued.labels(model).set(sum(replica.queued for replica in found))
            self.made.labels(model).set(sum(replica.images for replica in found))
        return generate_latest(self.registry)
