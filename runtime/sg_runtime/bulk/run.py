"""Run a job: sample the shards that are missing, and write each when it is complete."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sg_runtime.bulk.folder import opened
from sg_runtime.bulk.formats import FORMS, File, files_of
from sg_runtime.bulk.job import Job, Request, plan
from sg_runtime.errors import DeviceMemoryError
from sg_runtime.pipeline import Pipeline

ENCODERS = 4
"""Threads that encode images while the next ones are sampled."""

Progress = Callable[[int, int], None]
"""Called with (images sampled, images of the job)."""


class Workers(Protocol):
    """What samples the shards of a job."""

    @property
    def job(self) -> Job:
        """The job."""
        ...

    def shards(self, missing: Sequence[int], done: Callable[[int], None]) -> Iterator[tuple[int, list[File]]]:
        """Yield each of these shards with its files, in any order.

        done: called with the number of images that were sampled since the last call.
        """
        ...


class ShardSampler:
    """A pipeline that samples the shards of a job. Not for several threads."""

    def __init__(self, pipe: Pipeline, job: Job) -> None:
        self.pipe, self.job = pipe, job

    def __call__(self, shard: int, done: Callable[[int], None]) -> list[File]:
        """Return the files of a shard.

        Every run of a graph has as many images as the job's batch; the last one repeats its last
        image. So an image depends neither on the shard that it is in nor on where the job was
        stopped. done: see `Workers.shards`.
        """
        images, encode = self.job.images(shard), FORMS[self.job.format].encode
        pool = ThreadPoolExecutor(ENCODERS)
        try:
            encoding = []
            for start in range(0, len(images), self.job.batch):
                part = images[start : start + self.job.batch]
                pixels = self.sample([*part, *[part[-1]] * (self.job.batch - len(part))])
                encoding += [pool.submit(encode, picture) for picture in pixels[: len(part)]]
                done(len(part))
            return files_of(self.job, shard, [picture.result() for picture in encoding])
        finally:
            pool.shutdown(cancel_futures=True)

    def sample(self, images: Sequence[int]) -> NDArray[np.uint8]:
        """Return the pixels of images of the job, (B, H, W, C) uint8."""
        job = self.job
        given = [job.condition(image) for image in images]
        conditions = self.pipe.from_text([str(text) for text in given], job.negative) if job.prompts else given
        x = self.pipe.sample(
            conditions,
            [job.seed_of(image) for image in images],
            steps=job.steps,
            sampler=job.sampler,
            guidance=job.guidance,
            churn=job.churn,
        )
        return self.pipe.decode(x)


class LocalWorkers:
    """One pipeline in this process."""

    def __init__(self, pipe: Pipeline, job: Job) -> None:
        self._sample, self.job = ShardSampler(pipe, job), job

    def shards(self, missing: Sequence[int], done: Callable[[int], None]) -> Iterator[tuple[int, list[File]]]:
        """Yield the shards in order; see `Workers`."""
        for shard in missing:
            yield shard, self._sample(shard, done)


@dataclass(frozen=True, slots=True)
class Done:
    """What a call of `run_job` did.

    images: number of images of the job.
    sampled: number of them that this call sampled.
    seconds: time of the sampling, without the opening of the bundle.
    """

    images: int
    sampled: int
    seconds: float


def run_job(
    request: Request, output: Path, *, cluster: str | None = None, progress: Progress = lambda done, images: None
) -> Done:
    """Sample the images of a request into the folder `output`, or go on with a job that is there.

    A process that is killed leaves complete shards; a later call with the same request samples the
    others. The result is the same, bit for bit.

    cluster: address of a Ray cluster that samples the shards, or "" for one on this machine alone;
    None to sample in this process.

    Raises UsageError if another process works in the folder, if its job began with other options,
    or if the bundle cannot serve the request; BundleError if the job began with another bundle;
    JobError if its files are damaged; and OSError if the disk is full. The complete shards stay.
    """
    with opened(output) as folder, _workers(request.continuing(folder.job), cluster) as workers:
        folder.begin(workers.job)
        before, images = folder.images, workers.job.count
        sampled, began = 0, time.monotonic()

        def done(more: int) -> None:
            nonlocal sampled
            sampled += more
            progress(before + sampled, images)

        progress(before, images)
        try:
            for shard, files in workers.shards(folder.missing, done):
                folder.write(shard, files)
        except DeviceMemoryError as error:
            raise DeviceMemoryError(f"{error}. A job keeps its batch: give another `output`, too") from error
        seconds = time.monotonic() - began
        folder.finish()
        return Done(images, images - before, seconds)


def _workers(request: Request, cluster: str | None) -> AbstractContextManager[Workers]:
    if cluster is None:
        return _local(request)
    from sg_runtime.bulk.cluster import ray_workers

    return ray_workers(request, cluster)


@contextmanager
def _local(request: Request) -> Iterator[LocalWorkers]:
    pipe, bundle = request.load()
    yield LocalWorkers(pipe, plan(request, pipe, bundle))
