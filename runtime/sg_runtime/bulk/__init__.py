"""Sampling by the ten thousand: a job in shards, which goes on where it was stopped."""

from sg_runtime.bulk.job import FORMATS, Job, Request
from sg_runtime.bulk.run import Done, run_job

__all__ = ["FORMATS", "Done", "Job", "Request", "run_job"]
