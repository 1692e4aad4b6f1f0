"""The files of a job: PNG files, tar shards of WebDataset, or one .npz file."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from sg_runtime.bulk.job import Format, Job
from sg_runtime.files import replacing, to_disk
from sg_runtime.images import png_bytes

Pixels = NDArray[np.uint8]
"""One image, (H, W, C) uint8."""

File = tuple[str, bytes]
"""Name of a file in the folder of a job, and its content."""

IMAGES = "images"
"""Folder of PNG files."""

PARTS = "parts"
"""Folder of the shards of an .npz file, until it is written."""

METADATA = f"{IMAGES}/metadata.jsonl"
"""File next to PNG files with a line for each: its name, number, seed, and class or prompt."""

NPZ = "samples.npz"


@dataclass(frozen=True, slots=True)
class Form:
    """How the images of a shard become files.

    encode: one image to bytes.
    names: names of the files of a shard.
    pack: encoded images of a shard to the contents of its files, in the order of `names`.
    """

    encode: Callable[[Pixels], bytes]
    names: Callable[[Job, int], list[str]]
    pack: Callable[[Job, int, Sequence[bytes]], list[bytes]]


def _tar(job: Job, shard: int, pictures: Sequence[bytes]) -> bytes:
    """Return a tar file of WebDataset. Equal images give equal bytes, whenever it is made."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for image, picture in zip(job.images(shard), pictures, strict=True):
            condition = job.condition(image)
            members = {
                "png": picture,
                "cls" if job.classes else "txt": str(condition).encode(),
                "json": json.dumps(job.facts(image), ensure_ascii=False).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{job.name(image)}.{suffix}")  # of user 0, at time 0
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def _npy(job: Job, shard: int, pixels: Sequence[bytes]) -> bytes:
    """Return an .npy file of the shard's images, (B, H, W, C) uint8."""
    content = io.BytesIO()
    _write_header(content, (len(job.images(shard)), *job.shape))
    content.write(b"".join(pixels))
    return content.getvalue()


FORMS: Mapping[Format, Form] = {
    "png": Form(
        png_bytes,
        lambda job, shard: [f"{IMAGES}/{job.name(image)}.png" for image in job.images(shard)],
        lambda job, shard, pictures: list(pictures),
    ),
    "webdataset": Form(
        png_bytes,
        lambda job, shard: [f"{shard:0{max(5, len(str(job.shards - 1)))}}.tar"],
        lambda job, shard, pictures: [_tar(job, shard, pictures)],
    ),
    "npz": Form(
        lambda pixels: pixels.tobytes(),
        lambda job, shard: [f"{PARTS}/{shard:0{max(5, len(str(job.shards - 1)))}}.npy"],
        lambda job, shard, pixels: [_npy(job, shard, pixels)],
    ),
}


def names_of(job: Job, shard: int) -> list[str]:
    """Return the names of the files of a shard."""
    return FORMS[job.format].names(job, shard)


def files_of(job: Job, shard: int, encoded: Sequence[bytes]) -> list[File]:
    """Return the files of a shard, of its encoded images in order."""
    form = FORMS[job.format]
    return list(zip(form.names(job, shard), form.pack(job, shard, encoded), strict=True))


def write_metadata(job: Job, path: Path) -> None:
    """Write the file next to PNG files that says what each image was made of.

    It has the form that the `imagefolder` of Hugging Face datasets reads.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for image in range(job.count):
            line = {"file_name": f"{job.name(image)}.png", **job.facts(image)}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_npz(job: Job, path: Path, parts: Iterable[bytes]) -> None:
    """Write the .npz file of a job: arr_0 are the images, arr_1 the classes.

    parts: contents of the .npy file of each shard, in order. They are read one at a time.

    Equal images give equal bytes. The form is that of the evaluation suite of ADM
    (openai/guided-diffusion, `evaluations/evaluator.py`).
    """
    with replacing(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            with _member(archive, "arr_0.npy") as stream:
                _write_header(stream, (job.count, *job.shape))
                for part in parts:
                    stream.write(np.load(io.BytesIO(part)).data)
            if job.classes:
                labels = np.array([job.condition(image) for image in range(job.count)], np.int64)
                with _member(archive, "arr_1.npy") as stream:
                    np.lib.format.write_array(stream, labels, version=(1, 0))
        to_disk(temporary)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open a new file of an archive, at a fixed time, for more than 2 GB if need be."""
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


def _write_header(stream: IO[bytes], shape: tuple[int, ...]) -> None:
    """Write the header of an .npy file of uint8."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(cast(Any, stream), header)
