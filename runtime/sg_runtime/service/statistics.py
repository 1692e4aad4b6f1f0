"""What a service has done, as plain numbers."""

from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["wait", "encode", "sample", "decode"]

PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of the time that a request takes, in order."""


@dataclass(slots=True)
class Parts:
    """Seconds that a request took, by part.

    wait: from its arrival to the start of its first run.
    encode: encoding of prompts in the runs that it took part in.
    sample: sampling in these runs.
    decode: decoding in these runs.
    """

    wait: float = 0.0
    encode: float = 0.0
    sample: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a service has done since it started.

    requests: number of requests that entered the queue.
    answered, failed, expired, cancelled: number of these that ended so. The others are waiting or
    running.
    refused: number of requests that did not enter the queue.
    images: number of images in answers and in runs whose request was cancelled.
    queued: number of images that wait now.
    longest: largest number of images that waited at the same time.
    runs: number of runs, by their number of images.
    seconds: seconds that the runs took, by part.
    """

    requests: int
    answered: int
    failed: int
    expired: int
    cancelled: int
    refused: int
    images: int
    queued: int
    longest: int
    runs: dict[int, int]
    seconds: dict[Part, float]
