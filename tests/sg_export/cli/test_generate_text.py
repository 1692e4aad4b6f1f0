"""`sg-export generate` with prompts."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sg_calibration.prompts import read_prompts
from sg_runtime import __version__

FAST = ("--steps", 1, "-q")


def test_generate_writes_prompts_seeds_guidance_and_bundle_into_the_png(
    cli: Callable[..., Any], full_bundle: Path, tmp_path: Path
) -> None:
    asked = ("--prompt", "a cat", "--prompt", "zwei Hündchen", "--seed", 7, "--negative", "blurry", "--count", 3)
    assert cli("generate", full_bundle, *asked, *FAST, "-o", tmp_path / "x.png").exit_code == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.text == {
            "Prompt": "a cat\nzwei Hündchen\na cat",
            "Negative prompt": "blurry",
            "Seed": "7\n8\n9",
            "Guidance": "cfg, scale 3, one subset for all steps",
            "Bundle": "prx-full-bundle",
            "Software": f"sg-export {__version__}",
        }
        assert image.size[0] == 2 * 64
        assert image.size[1] > 2 * 64, "captions stand below the images"


def test_generate_of_one_prompt_has_no_caption_unless_it_is_asked_for(
    cli: Callable[..., Any], full_bundle: Path, tmp_path: Path
) -> None:
    asked = ("generate", full_bundle, "--prompt", "a cat", *FAST, "-o")
    assert cli(*asked, tmp_path / "a.png").exit_code == cli(*asked, tmp_path / "b.png", "--captions").exit_code == 0
    with Image.open(tmp_path / "a.png") as plain, Image.open(tmp_path / "b.png") as captioned:
        assert plain.size == (64, 64)
        np.testing.assert_array_equal(np.asarray(captioned)[:64], np.asarray(plain))
        assert np.asarray(captioned)[64:].max() > 128


def test_generate_reads_prompts_of_a_file(cli: Callable[..., Any], full_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    asked = ("--prompt-file", tmp_path / "prompts.txt", "--no-captions", "--keep", "one")
    assert cli("generate", full_bundle, *asked, *FAST, "-o", tmp_path / "x.png").exit_code == 0
    with Image.open(tmp_path / "x.png") as image:
        assert (image.text["Prompt"], image.size) == ("a cat\na dog", (128, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt: expected at least one, since the model is conditioned on text, found none"),
        (["--class", "1"], "--class: expected none: the model is conditioned on text: give --prompt"),
        (["--prompt", ""], "prompts: expected words, found ''"),
        (["--prompt", "a", "--size", "32x32"], "size 32x32 is not in this bundle, which has 64x64"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: expected a text file, found one that cannot be read"),
        (["--prompt-file", "empty.txt"], "--prompt-file empty.txt: expected a prompt in each line, found none"),
    ],
)
def test_generate_of_prompts_that_cannot_be_ends_with_2(
    arguments: list[str],
    message: str,
    refused: Callable[..., str],
    full_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    assert message in refused(2, "generate", full_bundle, *arguments, *FAST, "-o", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_generate_of_a_class_model_with_a_prompt_ends_with_2(
    refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    asked = ("generate", tiny_bundle, "--prompt", "a cat", "-o", tmp_path / "x.npy")
    assert "--prompt: expected none: the model is conditioned on classes: give --class" in refused(2, *asked)


def test_doctor_says_what_each_part_needs_and_which_library_is_missing(
    cli: Callable[..., Any], full_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = cli("doctor", full_bundle).stdout.splitlines()
    assert any(line.startswith("part text: ") and line.endswith("MB with activations") for line in lines)
    assert any(line.startswith("part decode: ") for line in lines)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    lines = cli("doctor", full_bundle).stdout.splitlines()
    assert any(line.startswith("not the part text: ftfy is not installed: pip install") for line in lines)


def test_inspect_and_bench_show_the_parts_on_lines_of_their_own(cli: Callable[..., Any], full_bundle: Path) -> None:
    shown = cli("inspect", full_bundle).stdout
    assert "scores capped by a tanh, so no fused attention" in shown
    assert "Cost of an image with a prompt of its own, by part" in shown
    timed = cli("bench", full_bundle, "--runs", 1, "--steps", 1).stdout
    assert "ms for a prompt" in timed
    assert "ms for an image" in timed


@pytest.mark.slow
def test_report_shows_the_prompts_and_their_images(cli: Callable[..., Any], full_bundle: Path, tmp_path: Path) -> None:
    assert cli("report", full_bundle, "-q", "-o", tmp_path / "page.html").exit_code == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<li>{read_prompts(None)[0]}</li>" in text
    assert text.count("<img") == 2, "unguided and CFG"
    assert "<td>decode</td>" in text
