"""Opening complete bundles, and paths that are not bundles. Damaged bundles: `tests/attacks`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError
from sg_runtime.manifest import read_manifest


def test_open_of_a_whole_bundle_gives_its_manifest_and_files(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.path == tiny_bundle
    assert bundle.manifest == read_manifest(tiny_bundle / "manifest.json")
    for name, facts in bundle.manifest.files.items():
        assert bundle.file(name).stat().st_size == facts.size


def test_open_of_a_path_as_text_is_the_same(tiny_bundle: Path) -> None:
    assert Bundle.open(str(tiny_bundle)) == Bundle.open(tiny_bundle)


def test_open_of_a_bundle_that_moved_succeeds(tiny_bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_bundle, moved)
    assert Bundle.open(moved).manifest == Bundle.open(tiny_bundle).manifest


def test_open_of_a_link_to_a_bundle_succeeds(tiny_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_bundle)
    assert Bundle.open(link).manifest == Bundle.open(tiny_bundle).manifest


def test_open_of_a_bundle_with_links_inside_succeeds(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    (copy / "graphs/weights.bin").rename(copy / "shared.bin")
    (copy / "graphs/weights.bin").symlink_to("../shared.bin")
    assert Bundle.open(copy).path == copy


def test_open_of_a_path_without_anything_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / "none")
    assert str(caught.value) == (
        f"{tmp_path / 'none'}: expected a bundle (a directory), found nothing there; make one with sg-export build"
    )


@pytest.mark.parametrize("name", ["manifest.json", "graphs", "graphs/weights.bin"])
def test_open_of_a_part_of_a_bundle_names_the_bundle(name: str, tiny_bundle: Path) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(tiny_bundle / name)
    assert str(caught.value) == (
        f"{tiny_bundle / name}: expected a bundle (a directory), found a part of one; give {tiny_bundle}"
    )


@pytest.mark.parametrize(
    ("files", "given", "found"),
    [
        (["notes.txt"], "notes.txt", "a file; make one with sg-export build"),
        (["last.pt"], "last.pt", "a checkpoint; make one with sg-export build {}/last.pt"),
        (["b.safetensors", "a.pth"], ".", "a folder of checkpoints; make one with sg-export build {}/a.pth"),
        (["x/manifest.json", "y/manifest.json", "a.pt"], ".", "a folder of bundles; give {0}/x or {0}/y"),
        (
            ["model_index.json", "vae/config.json"],
            ".",
            "a Diffusers pipeline (model_index.json); make one with sg-export build from a checkpoint of tread or "
            "MaskDiT",
        ),
        (
            ["config.json", "diffusion_pytorch_model.safetensors"],
            ".",
            "a model of another library (config.json); make one with sg-export build from a checkpoint of tread or "
            "MaskDiT",
        ),
    ],
)
def test_open_of_something_else_says_what_it_is_and_what_to_give(
    files: list[str], given: str, found: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / given)
    assert str(caught.value) == (f"{tmp_path / given}: expected a bundle (a directory), found {found.format(tmp_path)}")


def test_open_of_an_empty_folder_misses_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: expected the manifest of a bundle, found No such file"):
        Bundle.open(tmp_path)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_open_without_hashes_passes_a_flipped_byte_and_checks_sizes(
    edited: Callable[[Callable[[Any], object]], Path],
) -> None:
    """This is the documented cost of skipping the hashes."""
    copy = edited(lambda content: None)
    flip_a_byte(copy / "graphs/weights.bin")
    assert Bundle.open(copy, verify_hashes=False).path == copy
    with pytest.raises(BundleError, match="it was altered after the build"):
        Bundle.open(copy)
    with (copy / "graphs/weights.bin").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(BundleError, match=r"weights\.bin: expected \d+ bytes, found \d+"):
        Bundle.open(copy, verify_hashes=False)
