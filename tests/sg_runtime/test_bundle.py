"""Opening complete bundles, and paths that are not bundles. Damaged bundles: `tests/attacks`."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import read_manifest
from sg_runtime.pipeline import Pipeline


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


def test_load_of_a_hugging_face_cache_runs_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    """Every file is a link to a file named by its hash, outside of the bundle."""
    snapshot, blobs = tmp_path / "snapshots/0123abc", tmp_path / "blobs"
    blobs.mkdir()
    for file in filter(Path.is_file, tiny_bundle.rglob("*")):
        link, blob = snapshot / file.relative_to(tiny_bundle), blobs / sha256_of(file)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    found, expected = (Pipeline.load(path).sample([0], [0], steps=2) for path in (snapshot, tiny_bundle))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [".DS_Store", "._weights.bin", "Thumbs.db", "desktop.ini", ".nfs0000000012ab"])
def test_open_of_a_bundle_with_a_file_of_the_system_succeeds(copy: Path, name: str) -> None:
    for folder in (copy, copy / "graphs"):
        (folder / name).write_bytes(b"left by a desktop or a network mount")
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
            "a Diffusers pipeline (model_index.json); make one with sg-export build from a checkpoint of tread, "
            "MaskDiT or PRX",
        ),
        (
            ["config.json", "diffusion_pytorch_model.safetensors"],
            ".",
            "a model of another library (config.json); make one with sg-export build from a checkpoint of tread, "
            "MaskDiT or PRX",
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


def test_open_of_a_manifest_with_a_byte_order_mark_succeeds(copy: Path) -> None:
    manifest = copy / "manifest.json"
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    assert Bundle.open(copy).path == copy


def test_open_of_an_address_says_to_download() -> None:
    with pytest.raises(BundleError, match=r"found an address; download the bundle and give its folder$"):
        Bundle.open("https://example.org/bundle")


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


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle for a test to change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def replace_file(path: Path) -> None:
    """Put a file of the same size, times and other content in the place of `path`."""
    times = path.stat()
    new = path.with_suffix(".new")
    shutil.copy(path, new)
    flip_a_byte(new)
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(path)


WEIGHTS = "graphs/weights.bin"


@pytest.mark.parametrize("change", [flip_a_byte, replace_file, Path.unlink])
@pytest.mark.parametrize("verify_hashes", [True, False])
def test_reading_of_a_changed_file_is_refused(
    copy: Path, change: Callable[[Path], object], verify_hashes: bool
) -> None:
    bundle = Bundle.open(copy, verify_hashes=verify_hashes)
    change(copy / WEIGHTS)
    with pytest.raises(BundleError) as caught, bundle.reading(WEIGHTS):
        raise AssertionError("the block must not run")
    assert str(caught.value) == (
        f"{copy}: file {WEIGHTS} was changed after the bundle was loaded: load the bundle again"
    )


def test_reading_of_a_file_that_changes_meanwhile_is_refused(copy: Path) -> None:
    """The change is reported, not the error that it caused."""
    bundle = Bundle.open(copy)

    def read() -> None:
        with bundle.reading(WEIGHTS):
            replace_file(copy / WEIGHTS)
            raise ValueError("damaged")

    with pytest.raises(BundleError, match="was changed after the bundle was loaded"):
        read()


def test_reading_of_a_copy_with_the_same_content_succeeds(copy: Path) -> None:
    bundle = Bundle.open(copy)
    shutil.copy(copy / WEIGHTS, copy / "new")
    (copy / "new").replace(copy / WEIGHTS)
    (copy / "graphs/dense.onnx").chmod(0o600)
    with bundle.reading(WEIGHTS, "graphs/dense.onnx"):
        pass


def test_check_unchanged_of_a_mapped_file_refuses_only_a_change_in_place(copy: Path) -> None:
    bundle = Bundle.open(copy)
    (copy / WEIGHTS).rename(copy.parent / "kept")  # as a mapping keeps it
    bundle.check_unchanged(WEIGHTS, mapped=True)
    shutil.copy(copy.parent / "kept", copy / WEIGHTS)
    flip_a_byte(copy / WEIGHTS)
    bundle.check_unchanged(WEIGHTS, mapped=True)
    (copy / WEIGHTS).unlink()
    (copy.parent / "kept").rename(copy / WEIGHTS)
    flip_a_byte(copy / WEIGHTS)
    with pytest.raises(BundleError, match="was changed after the bundle was loaded"):
        bundle.check_unchanged(WEIGHTS, mapped=True)


def test_open_of_a_file_that_changes_while_it_is_read_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(path: Path) -> str:
        found = sha256_of(path)
        replace_file(path)
        return found

    monkeypatch.setattr("sg_runtime.bundle.sha256_of", slowly)
    with pytest.raises(BundleError, match="changed while it was read: try again"):
        Bundle.open(copy)
