"""`sg-export generate`."""

import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sg_runtime.bundle import Bundle
from sg_runtime.files import sha256_of
from sg_runtime.manifest import FileFacts, write_manifest
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import Churn

FAST = ("--steps", 1)


@pytest.fixture
def samples(cli: Callable[..., Any], glyphs_bundle: Path, tmp_path: Path) -> Callable[..., NDArray[np.float32]]:
    """Return a function that runs generate with a .npy file as output and returns the array."""

    def run(*arguments: object) -> NDArray[np.float32]:
        result = cli("generate", glyphs_bundle, *FAST, *arguments, "-o", tmp_path / "x.npy")
        assert result.exit_code == 0, result.output
        x: NDArray[np.float32] = np.load(tmp_path / "x.npy")
        return x

    return run


def test_generate_npy_is_what_the_pipeline_samples(samples: Callable[..., Any], glyphs_bundle: Path) -> None:
    x = samples("--class", "A", "--class", 3, "--seed", 5)
    expected = Pipeline.load(glyphs_bundle).sample([0, 3], [5, 6], steps=1)
    assert x.dtype == np.float32
    # The batch is the same, so the bits are the same.
    assert np.array_equal(x, expected)


@pytest.mark.parametrize(("name", "index"), [("A", 0), ("a", 26), ("Z", 25)])
def test_generate_class_by_name_is_that_by_index(name: str, index: int, samples: Callable[..., Any]) -> None:
    assert np.array_equal(samples("--class", name), samples("--class", index))


def test_generate_class_that_is_a_number_is_an_index(samples: Callable[..., Any]) -> None:
    # The model has a class named 9, at index 61.
    assert np.array_equal(samples("--class", 9), samples("--class", "J"))


def test_generate_count_takes_classes_in_turn(samples: Callable[..., Any]) -> None:
    x = samples("--class", "A", "--class", "B", "--count", 3)
    assert len(x) == 3
    # Image k has seed k, regardless of its class.
    np.testing.assert_allclose(x[2:], samples("--class", "A", "--seed", 2), atol=1e-5)  # FP32 sums of another batch


def test_generate_by_default_is_one_image_of_each_class(samples: Callable[..., Any]) -> None:
    assert samples().shape == (62, 1, 16, 16)


def test_generate_of_the_last_seed_goes_on_with_the_first(samples: Callable[..., Any]) -> None:
    x = samples("--class", "A", "--count", 2, "--seed", 2**64 - 1)
    np.testing.assert_allclose(x[1:], samples("--class", "A", "--seed", 0), atol=1e-5)  # FP32 sums of another batch


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--guidance", "none"], {"mode": "none"}),
        (["--guidance", "cfg", "--scale", 1.5], {"mode": "cfg", "scale": 1.5}),
        (["--sparsity", 0.75, "--strong-sparsity", 0.25], {"strong_sparsity": 0.25, "sparsity": 0.75}),
        (["--guidance", "cfg+sg", "--sparsity", 0.75], {"mode": "cfg+sg", "sparsity": 0.75}),
        (["--scale", "3:1"], {"scale": (3.0, 1.0)}),
        (
            ["--sparsity", "0.75:0", "--strong-sparsity", "0:0.75"],
            {"strong_sparsity": (0.0, 0.75), "sparsity": (0.75, 0.0)},
        ),
        (["--interval", 0.1, 0.6], {"interval": (0.1, 0.6)}),
    ],
)
def test_generate_guidance_options_reach_the_pipeline(
    arguments: list[Any], settings: dict[str, Any], samples: Callable[..., Any], glyphs_bundle: Path
) -> None:
    pipe = Pipeline.load(glyphs_bundle)
    expected = pipe.sample([1], [0], steps=2, sampler="heun", guidance=pipe.guidance(**settings))
    assert np.array_equal(samples("--class", 1, *arguments, "--steps", 2, "--sampler", "heun"), expected)


@pytest.mark.parametrize(
    ("arguments", "churn"),
    [
        ([], None),
        (["--churn", 2], Churn(2.0)),
        (["--churn", 2, "--churn-range", 0.1, 50, "--churn-noise", 1.1], Churn(2.0, 0.1, 50.0, 1.1)),
    ],
)
def test_generate_churn_options_reach_the_pipeline(
    arguments: list[Any], churn: Churn | None, cli: Callable[..., Any], tiny_edm_bundle: Path, tmp_path: Path
) -> None:
    words = ("--class", 1, "--count", 3, "--steps", 3, *arguments, "-o", tmp_path / "x.npy")
    result = cli("generate", tiny_edm_bundle, *words)
    assert result.exit_code == 0, result.output
    pipe = Pipeline.load(tiny_edm_bundle)
    found, expected = np.load(tmp_path / "x.npy"), pipe.sample([1] * 3, [0, 1, 2], steps=3, churn=churn)
    assert np.array_equal(found, expected)
    if churn is not None:
        assert not np.allclose(found, pipe.sample([1] * 3, [0, 1, 2], steps=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--churn", "-1"], "churn: expected an amount and noise of at least 0 and low <= high, found amount -1"),
        (["--churn", "nan"], "churn: expected an amount and noise of at least 0 and low <= high, found amount nan"),
        (["--churn", "1", "--churn-range", "2", "1"], "amount 1, noise 1, 2 to 1"),
        (["--churn", "1", "--churn-noise", "-1"], "amount 1, noise -1, 0 to inf"),
        (
            ["--churn-range", "1", "2"],
            "--churn-range: describes the noise that --churn adds: give --churn, too",
        ),
        (
            ["--churn-noise", "1.1"],
            "--churn-noise: describes the noise that --churn adds: give --churn, too",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_of_wrong_churn_ends_with_2(
    arguments: list[str], message: str, refused: Callable[..., str], tiny_edm_bundle: Path, tmp_path: Path
) -> None:
    assert message in refused(2, "generate", tiny_edm_bundle, *arguments, "-o", tmp_path / "x.npy")
    assert not list(tmp_path.iterdir())


def test_generate_png_is_a_grid(cli: Callable[..., Any], glyphs_bundle: Path, tmp_path: Path) -> None:
    layout = ("--count", 5, "--columns", 3, "--zoom", 2, "--batch", 2)
    result = cli("generate", glyphs_bundle, *FAST, *layout, "-o", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path}/grid.png: 5 images\n"
    first, last = result.stderr.splitlines()
    assert first == "[1/3] sampling"
    assert re.fullmatch(r"sampled in [\d.e-]+ s: [\d.e+]+ images/s", last)
    with Image.open(tmp_path / "grid.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (3 * 16 * 2, 2 * 16 * 2))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_generate_in_a_pipe_reports_its_rate_now_and_then(
    cli: Callable[..., Any], glyphs_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the rate counts how often it is read, in tens of seconds."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr(sys.modules["sg_export.progress"], "time", clock)
    result = cli("generate", glyphs_bundle, "--steps", 3, "--count", 1, "-o", tmp_path / "a.png")
    *rates, last = result.stderr.splitlines()
    assert rates == [f"[{done}/3] sampling, 0.1 steps/s, {30 - 10 * done} s left" for done in (1, 2, 3)]
    _, seconds, _, rate, _ = last.replace("in", "").split()  # of the complete run
    assert float(seconds) * float(rate) == pytest.approx(1, rel=0.01)


def test_generate_quiet_prints_nothing(cli: Callable[..., Any], glyphs_bundle: Path, tmp_path: Path) -> None:
    result = cli("generate", glyphs_bundle, *FAST, "--count", 1, "-q", "-o", tmp_path / "a.png")
    assert (result.exit_code, result.output) == (0, "")


def test_generate_replaces_an_older_file(samples: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_text("old")
    assert samples("--count", 1).shape == (1, 1, 16, 16)


def test_generate_of_latents_writes_npy_and_refuses_png(
    cli: Callable[..., Any], refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    assert cli("generate", tiny_bundle, *FAST, "-o", tmp_path / "x.npy").exit_code == 0
    assert np.load(tmp_path / "x.npy").shape == (5, 2, 8, 8)
    assert refused(2, "generate", tiny_bundle, *FAST, "-o", tmp_path / "x.png") == (
        f"{tmp_path}/x.png: expected .npy, since {tiny_bundle} samples latents and holds no decoder: "
        f"give --output {tmp_path}/x.npy and decode that file, or build with --vae"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "62"], "class 62: expected 0 to 61"),
        (["--class", "-1"], "class -1: expected 0 to 61"),
        (["--class", "1000000000000"], "class '1000000000000': expected one of the model's class names"),
        (["--class", "²"], "class '²': expected one of the model's class names, found no match; the model has A, B, C"),
        (["--class", "--5"], "class '--5': expected one of the model's class names"),
        (["--class", ""], "class '': expected one of the model's class names"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--steps", "-3"], "-3 is not in the range x>=1"),
        (["--count", "0"], "0 is not in the range x>=1"),
        (["--seed", "-1"], "-1 is not in the range 0<=x<=18446744073709551615"),
        (["--sampler", "ddim"], "'ddim' is not one of 'euler', 'heun'"),
        (["--sparsity", "0.9"], "sparsity 0.9 is not in this bundle, which has 0, 0.25, 0.5, 0.75; build it with: "),
        (
            ["--sparsity", "0.5:0.9"],
            "sparsity 0.9 is not in this bundle, which has 0, 0.25, 0.5, 0.75; build it with: ",
        ),
        (["--strong-sparsity", "0.1:0"], "sparsity 0.1 is not in this bundle"),
        (["--sparsity", "0.5:0:1"], "'0.5:0:1': expected a number, or two as FIRST:LAST"),
        (["--sparsity", "half"], "'half': expected a number, or two as FIRST:LAST"),
        (["--guidance", "cfg", "--sparsity", "0.5"], "cfg guidance has one sparsity: give the strong one"),
        (["--guidance", "autoguidance"], "autoguidance: this bundle has no weak checkpoint; build it with: sg-export "),
        (["--scale", "nan"], "scale: expected a finite float32 number, found nan"),
        (["--scale", "3:nan"], "scale: expected a finite float32 number, found nan"),
        (["--scale", "3:"], "'3:': expected a number, or two as FIRST:LAST"),
        (["--interval", "0.9", "0.1"], "interval: expected 0 <= lowest time <= highest time, found 0.9 to 0.1"),
        (["--churn", "1"], "churn: expected an edm model, found a model of flow"),
    ],
    ids=" ".join,
)
def test_generate_of_a_wrong_request_ends_with_2(
    arguments: list[str], message: str, refused: Callable[..., str], glyphs_bundle: Path, tmp_path: Path
) -> None:
    assert message in refused(2, "generate", glyphs_bundle, *arguments, "-o", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a.jpg", "a.jpg: expected a name that ends in .png or .npy"),
        ("grid", "grid: expected a name that ends in .png or .npy"),
        ("none/a.png", "none/a.png: cannot be written: found no folder "),
        ("folder.png", "folder.png: cannot be written (Is a directory): give another --output"),
        ("folder.npy", "folder.npy: cannot be written (Is a directory): give another --output"),
    ],
)
def test_generate_to_an_impossible_output_ends_with_2(
    output: str, message: str, refused: Callable[..., str], glyphs_bundle: Path, tmp_path: Path
) -> None:
    for name in ("folder.png", "folder.npy"):
        (tmp_path / name).mkdir()
    assert message in refused(2, "generate", glyphs_bundle, *FAST, "--count", 1, "-o", tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npy", "folder.png"]


@pytest.mark.parametrize("name", ["grid.png", "x.npy"])
def test_generate_on_a_full_disk_says_so(name: str, mounted: Callable[..., Any], glyphs_bundle: Path) -> None:
    size = "-t tmpfs -o size=4k none"
    result = mounted(size, "generate", glyphs_bundle, *FAST, "--zoom", 4, "-o", f"disk/{name}")
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"Error: disk/{name}: the disk is full; free some space, or give --output on another disk"
    )
    assert result.stdout == "left:\n"


@pytest.mark.parametrize("name", ["a.png", "x.npy"])
def test_generate_on_a_read_only_disk_ends_with_2(name: str, mounted: Callable[..., Any], glyphs_bundle: Path) -> None:
    result = mounted("-t tmpfs -o ro none", "generate", glyphs_bundle, *FAST, "--count", 1, "-o", f"disk/{name}")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"Error: disk/{name}: cannot be written ({os.strerror(30)}): give another --output"
    )


def test_generate_with_another_batch_than_the_graphs_ends_with_2(
    refused: Callable[..., str], fixed_bundle: Path, tmp_path: Path
) -> None:
    message = refused(2, "generate", fixed_bundle, "--batch", 2, "-o", tmp_path / "x.npy")
    assert message == f"batch: the graphs of {fixed_bundle} are fixed to 3 images, found 2"


def test_generate_of_a_missing_bundle_ends_with_6(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused(6, "generate", tmp_path / "none", "-o", tmp_path / "a.png")
    assert message.endswith("expected a bundle (a directory), found nothing there; make one with sg-export build")


def test_generate_with_a_graph_that_does_not_open_ends_with_4(
    refused: Callable[..., str], fixed_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(fixed_bundle, tmp_path / "bundle")
    graph = copy / "graphs/condition.onnx"
    graph.write_bytes(b"no graph")
    manifest = Bundle.open(fixed_bundle).manifest
    files = {**manifest.files, "graphs/condition.onnx": FileFacts(8, sha256_of(graph))}
    write_manifest(replace(manifest, files=files), copy / "manifest.json")
    message = refused(4, "generate", copy, *FAST, "-o", tmp_path / "x.npy")
    assert message.startswith("condition.onnx: ONNX Runtime ")
    assert not (tmp_path / "x.npy").exists()


def test_generate_that_is_interrupted_ends_with_130(
    refused: Callable[..., str], glyphs_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sg_runtime.images.Image.Image.save", interrupt)
    message = refused(130, "generate", glyphs_bundle, *FAST, "--count", 1, "-o", tmp_path / "a.png")
    assert message == "interrupted; nothing was left half-written"
    assert not list(tmp_path.iterdir())
