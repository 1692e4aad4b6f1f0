"""`sg-export sample`."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from job_folders import content, running, wait_for
from PIL import Image

from sg_runtime.bulk import Request
from sg_runtime.errors import UsageError
from sg_runtime.guidance import PlanChanges
from sg_runtime.sampling import Churn

SMALL = ("--count", 10, "--shard", 4, "--batch", 3, "--steps", 2, "--threads", 1)


def test_sample_prints_what_it_did_and_says_no_rate_if_nothing_was_left(
    cli: Callable[..., Any], picture_bundle: Path, tmp_path: Path
) -> None:
    result = cli("sample", picture_bundle, *SMALL, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path}: 10 images\n"
    first, last = result.stderr.splitlines()
    assert first == "[1/10] sampling"
    assert re.fullmatch(r"sampled 10 images in [\d.e-]+ s: [\d.e+]+ images/s", last)
    again = cli("sample", picture_bundle, *SMALL, "-o", tmp_path)
    assert (again.exit_code, again.stdout) == (0, f"{tmp_path}: 10 images\n")
    assert again.stderr == "[10/10] sampling\n"


def test_sample_quiet_prints_nothing(cli: Callable[..., Any], picture_bundle: Path, tmp_path: Path) -> None:
    result = cli("sample", picture_bundle, *SMALL, "-q", "-o", tmp_path)
    assert (result.exit_code, result.output) == (0, "")


def test_sample_in_a_pipe_reports_rate_and_time_left_now_and_then(
    cli: Callable[..., Any], picture_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock counts how often it is read, in tens of seconds."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr(sys.modules["sg_export.progress"], "time", clock)
    lines = cli("sample", picture_bundle, *SMALL, "-o", tmp_path).stderr.splitlines()
    assert lines[:-1] == [
        "[1/10] sampling",
        "[3/10] sampling, 0.3 images/s, 23 s left",
        "[4/10] sampling, 0.2 images/s, 30 s left",
        "[7/10] sampling, 0.233 images/s, 13 s left",
        "[8/10] sampling, 0.2 images/s, 10 s left",
        "[10/10] sampling, 0.2 images/s, 0 s left",
    ]


def test_sample_png_is_what_generate_samples(cli: Callable[..., Any], picture_bundle: Path, tmp_path: Path) -> None:
    options = ("--batch", 3, "--steps", 2, "--threads", 1, "--seed", 7, "--count", 3)
    assert cli("sample", picture_bundle, *options, "--classes", "4,0", "-o", tmp_path / "out").exit_code == 0
    chosen = ("--class", 4, "--class", 0, "--columns", 3)
    assert cli("generate", picture_bundle, *options, *chosen, "-o", tmp_path / "grid.png").exit_code == 0
    with Image.open(tmp_path / "grid.png") as grid:
        side_by_side = np.asarray(grid)
    for image in range(3):
        with Image.open(tmp_path / f"out/images/00000{image}.png") as found:
            assert np.array_equal(np.asarray(found), side_by_side[:, 8 * image : 8 * image + 8])


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], {}),
        (["--classes", "3,0-2"], {"classes": (3, 0, 1, 2)}),
        (["--seed", 5, "--size", "8x8"], {"seed": 5, "size": (8, 8)}),
        (["--sampler", "heun", "--churn", 2], {"sampler": "heun", "churn": Churn(2.0)}),
        (
            ["--guidance", "cfg", "--scale", "3:1", "--interval", 0.1, 0.6],
            {"guidance": PlanChanges(mode="cfg", scale=(3.0, 1.0), interval=(0.1, 0.6))},
        ),
        (["--format", "webdataset", "--keep", "one"], {"format": "webdataset", "keep": "one"}),
        (["--device", "cpu", "--backend", "onnxruntime-cpu"], {"device": "cpu", "backend": "onnxruntime-cpu"}),
    ],
    ids=str,
)
def test_sample_options_reach_the_request(
    options: list[Any],
    changes: dict[str, Any],
    cli: Callable[..., Any],
    picture_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request is caught in place of the sampling, which other tests see."""
    caught: list[Request] = []

    def catch(request: Request, output: Path, **settings: object) -> None:
        caught.append(request)
        raise UsageError("caught")

    monkeypatch.setattr("sg_runtime.bulk.run_job", catch)
    assert cli("sample", picture_bundle, *SMALL, *options, "-o", tmp_path).exit_code == 2
    usual = {"count": 10, "shard": 4, "batch": 3, "steps": 2, "threads": 1}
    assert caught == [Request(picture_bundle, **{**usual, **changes})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "0 is not in the range x>=1"),
        (["--classes", "5"], "class 5: expected 0 to 4"),
        (["--classes", "0-5"], "class 5: expected 0 to 4"),
        (["--classes", "3-1"], "'3-1': expected a range FIRST-LAST, found one that falls"),
        (["--classes", "0-9999999"], "class '0-9999999': expected one of the model's class names, found no match"),
        (["--classes", "cat"], "class 'cat': expected one of the model's class names, found no match"),
        (["--classes", "1,,2"], "class '': expected one of the model's class names"),
        (["--negative", "fog"], "prompts: expected none: the model is conditioned on classes: give --classes"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: expected a text file, found one that cannot be read"),
        (["--format", "jpg"], "'jpg' is not one of 'png', 'webdataset', 'npz'"),
        (["--churn", "1"], "churn: expected an edm model, found a model of flow"),
        (["--churn-noise", "2"], "--churn-noise: describes the noise that --churn adds: give --churn, too"),
        (["--guidance", "sg"], "sg: expected a branch sparser than 0, found none in this bundle"),
        (["--size", "9x9"], "size 9x9: expected 8x8, the size of all samples of this model"),
    ],
    ids=" ".join,
)
def test_sample_of_a_wrong_request_ends_with_2_and_begins_nothing(
    arguments: list[str], message: str, refused: Callable[..., str], picture_bundle: Path, tmp_path: Path
) -> None:
    assert message in refused(2, "sample", picture_bundle, *SMALL, *arguments, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sample_of_latents_without_decoder_ends_with_2(
    refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    message = refused(2, "sample", tiny_bundle, *SMALL, "-o", tmp_path / "out")
    assert message == (
        f"{tiny_bundle}: expected a bundle that gives images, found one that samples latents and holds no decoder: "
        f"build it with --vae FOLDER"
    )


def test_sample_of_a_missing_bundle_ends_with_6(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused(6, "sample", tmp_path / "none", *SMALL, "-o", tmp_path / "out")
    assert message.endswith("expected a bundle (a directory), found nothing there; make one with sg-export build")
    assert not list(tmp_path.iterdir())


def test_sample_with_other_options_in_the_folder_ends_with_2(
    cli: Callable[..., Any], refused: Callable[..., str], picture_bundle: Path, tmp_path: Path
) -> None:
    assert cli("sample", picture_bundle, *SMALL, "-o", tmp_path).exit_code == 0
    message = refused(2, "sample", picture_bundle, *SMALL, "--seed", 1, "--format", "npz", "-o", tmp_path)
    assert message == (
        f"{tmp_path}: expected the options that its job began with, found seed 1 in place of 0, format npz in place of "
        f"png: give the same options, or another --output"
    )


def test_sample_of_a_bundle_that_changed_ends_with_6(
    cli: Callable[..., Any], refused: Callable[..., str], picture_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(picture_bundle, tmp_path / "bundle")
    assert cli("sample", copy, *SMALL, "-o", tmp_path / "out").exit_code == 0
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["sampling"]["steps"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    message = refused(6, "sample", copy, *SMALL, "-o", tmp_path / "out")
    assert message.startswith(f"{copy}: expected the bundle that the job began with, of manifest ")
    assert message.endswith("restore that bundle, or give another --output")


def test_sample_of_a_damaged_job_ends_with_6(
    cli: Callable[..., Any], refused: Callable[..., str], picture_bundle: Path, tmp_path: Path
) -> None:
    assert cli("sample", picture_bundle, *SMALL, "-o", tmp_path).exit_code == 0
    (tmp_path / "job.json").write_text("{}")
    message = refused(6, "sample", picture_bundle, *SMALL, "-o", tmp_path)
    assert message.startswith(f"{tmp_path}/job.json: expected a record of a sampling job, found a damaged one (")
    assert message.endswith(": give another --output")


def test_sample_of_a_corrupt_shard_warns_and_samples_it_again(
    cli: Callable[..., Any], picture_bundle: Path, tmp_path: Path
) -> None:
    assert cli("sample", picture_bundle, *SMALL, "-o", tmp_path).exit_code == 0
    before = content(tmp_path)
    (tmp_path / "images/000008.png").write_bytes(b"")
    result = cli("sample", picture_bundle, *SMALL, "-o", tmp_path)
    assert result.exit_code == 0
    warning = result.stderr.splitlines()[0]
    assert warning.startswith(f"warning: {tmp_path}/images/000008.png to 000009.png: expected ")
    assert warning.endswith(": shard 2 is sampled again")
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("thesis", "thesis: expected an empty folder, or that of a job, found a.tex: give another --output"),
        ("thesis/a.tex", "is a file."),
    ],
)
def test_sample_to_an_impossible_output_ends_with_2(
    output: str, message: str, refused: Callable[..., str], picture_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/a.tex").touch()
    assert message in refused(2, "sample", picture_bundle, *SMALL, "-o", tmp_path / output)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["a.tex"]


def test_sample_on_a_read_only_disk_ends_with_2(mounted: Callable[..., Any], picture_bundle: Path) -> None:
    result = mounted("-t tmpfs -o ro none", "sample", picture_bundle, *SMALL, "-o", "disk/out")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"Error: disk/out: cannot be written ({os.strerror(30)}): give another --output"
    )


# A shard has no room; the .npz has none next to the shards, which are written before; all has room.
@pytest.mark.parametrize(
    ("format", "size", "code"), [("png", "32k", 1), ("npz", "32k", 1), ("npz", "52k", 1), ("npz", "64k", 0)]
)
def test_sample_on_a_full_disk_ends_with_1(
    format: str, size: str, code: int, mounted: Callable[..., Any], picture_bundle: Path
) -> None:
    options = ("--count", 100, "--shard", 20, "--batch", 10, "--steps", 1, "--threads", 1, "--format", format)
    result = mounted(f"-t tmpfs -o size={size} none", "sample", picture_bundle, *options, "-o", "disk/out")
    assert result.returncode == code, result.stderr
    if code:
        assert result.stderr.splitlines()[-1] == (
            "Error: disk/out: the disk is full; free some space, or give --output on another disk"
        )


LONG = ("--count", 40, "--shard", 4, "--batch", 2, "--steps", 800, "--threads", 1, "--format", "webdataset")


@pytest.fixture(scope="session")
def long_job(picture_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of the job `LONG`, which nothing disturbed."""
    from click.testing import CliRunner

    from sg_export.cli import main

    folder = tmp_path_factory.mktemp("long") / "out"
    words = [str(word) for word in ("sample", picture_bundle, *LONG, "-o", folder)]
    assert CliRunner().invoke(main, words).exit_code == 0
    return content(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGKILL, -9, None),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
    ],
)
def test_sample_that_is_ended_anywhere_goes_on_to_the_same_bytes(
    number: int,
    code: int,
    message: str | None,
    start: Callable[..., Any],
    cli: Callable[..., Any],
    picture_bundle: Path,
    long_job: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with running(start, "sample", picture_bundle, *LONG, "-o", out) as process:
        wait_for(lambda: len(list(out.glob("*.tar"))) >= 3)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code, rest
    if message is not None:
        assert rest.splitlines()[-1] == f"Error: {message}; nothing was left half-written"
        assert not list(out.rglob("*.partial"))
    assert content(out) != long_job
    result = cli("sample", picture_bundle, *LONG, "-o", out)
    assert int(re.findall(r"sampled (\d+) images", result.stderr)[0]) < 40
    assert content(out) == long_job


@pytest.mark.slow
def test_sample_of_two_jobs_in_one_folder_refuses_the_second(
    start: Callable[..., Any], refused: Callable[..., str], picture_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(start, "sample", picture_bundle, *LONG, "--count", 100000, "-o", out) as process:
        wait_for(lambda: (out / "job.json").exists())
        message = refused(2, "sample", picture_bundle, *LONG, "-o", out)
    assert message.startswith(f"{out}: expected no other process at work there, found process {process.pid} on ")
    assert message.endswith(": wait until it ends, or give another --output")


def test_sample_of_edm_with_churn_goes_on_as_the_same_job(
    cli: Callable[..., Any], refused: Callable[..., str], tiny_edm_bundle: Path, tmp_path: Path
) -> None:
    """The job's file holds noise up to an infinite sigma. Latents are taken for pixels here."""
    copy = shutil.copytree(tiny_edm_bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["model"].update(space="pixel", pixels_per_latent=1)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    options = ("sample", copy, *SMALL, "--format", "npz", "-o", tmp_path / "out", "--churn")
    for _ in range(2):
        assert cli(*options, 2).exit_code == 0
    assert json.loads((tmp_path / "out/job.json").read_bytes())["churn"]["high"] == float("inf")
    assert "found churn Churn(amount=3.0, " in refused(2, *options, 3)


@pytest.mark.slow
def test_sample_of_prompts_from_a_file_has_them_in_turn(
    cli: Callable[..., Any], full_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n zwei Hündchen \na dog\n", encoding="utf-8")
    options = ("--count", 4, "--shard", 3, "--steps", 1, "--threads", 1, "--prompt-file", tmp_path / "prompts.txt")
    for format in ("webdataset", "png", "npz"):
        result = cli("sample", full_bundle, *options, "--format", format, "-o", tmp_path / format)
        assert result.exit_code == 0, result.output
    texts = ["a cat", "zwei Hündchen", "a dog", "a cat"]
    with tarfile.open(tmp_path / "webdataset/00000.tar") as archive:
        for image in range(3):
            assert archive.extractfile(f"00000{image}.txt").read().decode() == texts[image]  # type: ignore[union-attr]
    lines = (tmp_path / "png/images/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == texts
    with np.load(tmp_path / "npz/samples.npz") as found:
        assert (found.files, found["arr_0"].shape) == (["arr_0"], (4, 64, 64, 3))
        with Image.open(io.BytesIO((tmp_path / "png/images/000003.png").read_bytes())) as picture:
            assert np.array_equal(np.asarray(picture), found["arr_0"][3])
        assert not np.array_equal(found["arr_0"][0], found["arr_0"][3]), "the seeds differ"
