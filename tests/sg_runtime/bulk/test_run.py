"""Jobs from beginning to end: their files, and what is left if they are stopped anywhere."""

import io
import json
import logging
import pickle
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_folders import content, run_killed
from numpy.typing import NDArray
from PIL import Image

from sg_runtime.bulk import FORMATS, Done, Request, run_job
from sg_runtime.errors import DeviceMemoryError, NonFiniteError, UsageError
from sg_runtime.manifest import MANIFEST_FILE
from sg_runtime.pipeline import Pipeline

Make = Callable[..., Request]


@pytest.fixture(scope="session")
def expected(picture_bundle: Path) -> NDArray[np.uint8]:
    """Return the pixels of the job of `request_of`, by the pipeline itself.

    Every run of a graph has three images, as the job's have.
    """
    pipe = Pipeline.load(picture_bundle, batch=3, threads=1)
    return pipe([image % 5 for image in range(12)], range(12), steps=2)[:10]


def decoded(picture: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_png_job_is_a_folder_of_pictures_and_what_they_are_of(
    request_of: Make, expected: NDArray[np.uint8], tmp_path: Path
) -> None:
    run_job(request_of(), tmp_path / "out")
    found = content(tmp_path / "out/images")
    lines = [json.loads(line) for line in found.pop("metadata.jsonl").splitlines()]
    assert sorted(found) == [f"{image:06}.png" for image in range(10)]
    assert lines[7] == {"file_name": "000007.png", "image": 7, "seed": 7, "class": 2}
    assert [line["file_name"] for line in lines] == sorted(found)
    for image, name in enumerate(sorted(found)):
        assert np.array_equal(decoded(found[name]), expected[image])


def test_webdataset_job_is_tar_files_of_samples_in_order(
    request_of: Make, expected: NDArray[np.uint8], tmp_path: Path
) -> None:
    """A sample is the neighbouring members of one name up to its first dot."""
    run_job(request_of(format="webdataset"), tmp_path / "out")
    names = []
    for number in range(3):
        with tarfile.open(tmp_path / f"out/{number:05}.tar") as archive:
            for member in archive.getmembers():
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                names.append(member.name)
                image, data = int(member.name[:6]), archive.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith("png"):
                    assert np.array_equal(decoded(data), expected[image])
                elif member.name.endswith("cls"):
                    assert int(data) == image % 5
                else:
                    assert json.loads(data) == {"image": image, "seed": image, "class": image % 5}
    assert names == [f"{image:06}.{suffix}" for image in range(10) for suffix in ("png", "cls", "json")]


def test_npz_job_is_one_file_of_images_and_classes(
    request_of: Make, expected: NDArray[np.uint8], tmp_path: Path
) -> None:
    run_job(request_of(format="npz"), tmp_path / "out")
    with np.load(tmp_path / "out/samples.npz") as found:
        assert found.files == ["arr_0", "arr_1"]
        assert (found["arr_0"].dtype, found["arr_1"].dtype) == (np.uint8, np.int64)
        assert np.array_equal(found["arr_0"], expected)
        assert found["arr_1"].tolist() == [0, 1, 2, 3, 4] * 2
    assert sorted(content(tmp_path / "out")) == ["job.json", "samples.npz", "shards.json"]


def test_images_do_not_depend_on_the_shard(request_of: Make, tmp_path: Path) -> None:
    """The place of an image in a run changes with the shard, not the number of its images."""
    for shard in (1, 4, 5, 10, 100):
        run_job(request_of(shard=shard, format="npz"), tmp_path / str(shard))
    files = {(tmp_path / str(shard) / "samples.npz").read_bytes() for shard in (1, 4, 5, 10, 100)}
    assert len(files) == 1


def test_images_of_a_larger_job_begin_as_those_of_a_smaller_one(request_of: Make, tmp_path: Path) -> None:
    for count in (5, 10):
        run_job(request_of(count=count), tmp_path / str(count))
    small, large = (content(tmp_path / str(count) / "images") for count in (5, 10))
    assert {name: large[name] for name in small if name.endswith("png")} == {
        name: value for name, value in small.items() if name.endswith("png")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "files"),
    [
        ("npz", range(1, 10)),  # job.json; each shard and its record; samples.npz and its record
        ("webdataset", (1, 2, 3)),
        ("png", (1, 4, 6, 15)),  # in a shard, at its record, at the metadata
    ],
)
def test_job_that_is_killed_goes_on_to_the_same_bytes(
    format: Any, files: Any, request_of: Make, tmp_path: Path
) -> None:
    """A process is killed before each file that it would put in place, in a folder of its own."""
    request = request_of(format=format)
    run_job(request, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    for last in files:
        folder = tmp_path / f"killed-{last}"
        assert run_killed(pickle.dumps(request), folder, last) == -signal.SIGKILL
        assert content(folder) != whole
        run_job(request, folder)
        assert content(folder) == whole, f"killed before file {last}"


@pytest.mark.slow
def test_job_that_is_killed_again_and_again_ends_with_the_same_bytes(request_of: Make, tmp_path: Path) -> None:
    """Every process completes one shard, with its record, and is killed in the next one."""
    request = request_of(format="webdataset", shard=2)
    run_job(request, tmp_path / "whole")
    ends = [run_killed(pickle.dumps(request), tmp_path / "out", 4 if number == 0 else 3) for number in range(6)]
    assert ends == [-signal.SIGKILL] * 4 + [0, 0]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
def test_complete_job_samples_nothing_again(format: Any, request_of: Make, tmp_path: Path) -> None:
    first = run_job(request_of(format=format), tmp_path)
    before = content(tmp_path)
    again = run_job(request_of(format=format), tmp_path)
    assert (first.images, first.sampled, again.images, again.sampled) == (10, 10, 10, 0)
    assert content(tmp_path) == before


def test_progress_counts_images_and_goes_on_where_the_job_was_stopped(request_of: Make, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(done: int, images: int) -> None:
        told.append(done)
        if done == 7:
            raise StoppedError

    told: list[int] = []
    with pytest.raises(StoppedError):
        run_job(request_of(), tmp_path, progress=stop)
    assert told == [0, 3, 4, 7]
    told.clear()
    done = run_job(request_of(), tmp_path, progress=lambda done, images: told.append(done))
    assert told == [4, 7, 8, 10]
    assert (done.images, done.sampled) == (10, 6)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "altered": lambda path: path.write_bytes(b"x" * path.stat().st_size),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("format", "name"), [("png", "images/000005.png"), ("webdataset", "00001.tar")])
def test_shard_that_is_damaged_is_sampled_again_with_a_warning(
    damage: str, format: Any, name: str, request_of: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_job(request_of(format=format), tmp_path)
    before = content(tmp_path)
    DAMAGES[damage](tmp_path / name)
    with caplog.at_level(logging.WARNING, "sg_runtime"):
        assert run_job(request_of(format=format), tmp_path).sampled == 4
    (record,) = caplog.records
    first = tmp_path / ("images/000004.png" if format == "png" else name)
    assert record.getMessage().startswith(str(first))
    assert record.getMessage().endswith("shard 1 is sampled again")
    assert content(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_npz_that_is_damaged_is_sampled_again_with_one_warning(
    damage: str, request_of: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_job(request_of(format="npz"), tmp_path)
    before = content(tmp_path)
    DAMAGES[damage](tmp_path / "samples.npz")
    with caplog.at_level(logging.WARNING, "sg_runtime"):
        assert run_job(request_of(format="npz"), tmp_path).sampled == 10
    (record,) = caplog.records
    assert record.getMessage().endswith("all its images are sampled again")
    assert content(tmp_path) == before


def test_job_with_other_options_in_the_folder_is_refused(request_of: Make, tmp_path: Path) -> None:
    run_job(request_of(), tmp_path)
    before = content(tmp_path)
    with pytest.raises(UsageError, match="found count 11 in place of 10, steps 3 in place of 2: give the same options"):
        run_job(request_of(count=11, steps=3), tmp_path)
    assert content(tmp_path) == before


def test_job_goes_on_with_the_batch_and_threads_that_it_began_with(request_of: Make, tmp_path: Path) -> None:
    run_job(request_of(), tmp_path)
    again = request_of(shard=None, batch=None, threads=None)
    assert run_job(again, tmp_path) == Done(10, 0, pytest.approx(0, abs=60))


def test_job_of_a_bundle_that_changed_is_refused(request_of: Make, picture_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(picture_bundle, tmp_path / "bundle")
    run_job(request_of(bundle=copy), tmp_path / "out")
    content_of = json.loads((copy / MANIFEST_FILE).read_bytes())
    content_of["sampling"]["steps"] += 1
    (copy / MANIFEST_FILE).write_text(json.dumps(content_of))
    with pytest.raises(Exception, match="expected the bundle that the job began with") as caught:
        run_job(request_of(bundle=copy), tmp_path / "out")
    assert getattr(caught.value, "exit_code", None) == 6


def test_samples_that_are_not_finite_end_the_job_and_leave_complete_shards(
    request_of: Make, picture_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Pipeline.sample

    def broken(pipe: Pipeline, classes: Any, seeds: Any, **settings: Any) -> Any:
        if 5 in seeds:
            raise NonFiniteError("image 5")
        return sample(pipe, classes, seeds, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "sample", broken)
        with pytest.raises(NonFiniteError):
            run_job(request_of(), tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 4
    assert run_job(request_of(), tmp_path).sampled == 6


def test_job_whose_batch_does_not_fit_asks_for_another_folder(
    request_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise DeviceMemoryError("a run of 3 images does not fit")

    monkeypatch.setattr(Pipeline, "sample", full)
    with pytest.raises(DeviceMemoryError, match=r"does not fit\. A job keeps its batch: give another `output`, too"):
        run_job(request_of(), tmp_path)


def test_job_can_run_in_a_thread(request_of: Make, tmp_path: Path) -> None:
    thread = threading.Thread(target=run_job, args=(replace(request_of(), format="npz"), tmp_path))
    thread.start()
    thread.join(60)
    assert (tmp_path / "samples.npz").exists()
