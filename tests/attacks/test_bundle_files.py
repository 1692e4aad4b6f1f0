"""Bundles whose files are missing, altered or moved.

The message names the file, and none is opened.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.errors import BundleError
from sg_runtime.pipeline import Pipeline

Edit = Callable[[Callable[[Any], object]], None]
Refused = Callable[..., None]

WEIGHTS = "graphs/weights.bin"


@pytest.mark.parametrize("name", [WEIGHTS, "graphs/condition.onnx", "graphs/guided-16-8.onnx"])
def test_load_of_a_missing_file_is_refused(bundle: Path, refused: Refused, name: str) -> None:
    (bundle / name).unlink()
    refused(f"file {name} is missing; copy the bundle again or rebuild it")


@pytest.mark.parametrize("name", [WEIGHTS, "graphs/dense.onnx"])
def test_load_of_a_flipped_byte_is_refused(bundle: Path, refused: Refused, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 0x40
    (bundle / name).write_bytes(content)
    refused(f"file {name}: expected SHA-256", "it was altered after the build", "rebuild it")


@pytest.mark.parametrize("name", [WEIGHTS, "graphs/dense.onnx"])
def test_load_of_a_truncated_file_is_refused(bundle: Path, refused: Refused, name: str) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size - 1)
    refused(f"file {name}: expected {size} bytes, found {size - 1}; copy the bundle again or rebuild it")


def test_load_of_an_empty_file_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / WEIGHTS).write_bytes(b"")
    refused(f"file {WEIGHTS}: expected ", " bytes, found 0;")


def test_load_of_a_longer_file_is_refused(bundle: Path, refused: Refused) -> None:
    with (bundle / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    refused(f"file {WEIGHTS}: expected ", " bytes, found ")


def test_load_of_two_files_in_each_others_place_is_refused(bundle: Path, edit: Edit, refused: Refused) -> None:
    """The sizes are made to match, the hashes are not."""
    first, second = bundle / "graphs/sparse-8.onnx", bundle / "graphs/sparse-12.onnx"
    swapped = first.read_bytes(), second.read_bytes()
    second.write_bytes(swapped[0])
    first.write_bytes(swapped[1])

    def swap_sizes(content: Any) -> None:
        a, b = (content["files"][f"graphs/{path.name}"] for path in (first, second))
        a["size"], b["size"] = b["size"], a["size"]

    edit(swap_sizes)
    refused("expected SHA-256")


def test_load_of_a_folder_in_a_files_place_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).mkdir()
    refused(f"file {WEIGHTS} is missing")


def test_load_of_a_pipe_in_a_files_place_is_refused_without_waiting(bundle: Path, refused: Refused) -> None:
    (bundle / WEIGHTS).unlink()
    os.mkfifo(bundle / WEIGHTS)
    refused(f"file {WEIGHTS} is missing")


def add_file(name: str, like: str = WEIGHTS) -> Callable[[Any], None]:
    """Return a change that lists a file under `name` with the size and hash of a real file."""

    def add(content: Any) -> None:
        content["files"][name] = content["files"][like]

    return add


@pytest.mark.parametrize(
    "name",
    [
        "../weights.bin",
        "graphs/../../weights.bin",
        "graphs/..",
        "..",
        "graphs\\weights.bin",
        "..\\weights.bin",
        "graphs/weights.bin\0",
    ],
)
def test_load_of_a_name_that_leads_out_is_refused(bundle: Path, edit: Edit, refused: Refused, name: str) -> None:
    """The name is refused even if it leads to a file with the right bytes."""
    shutil.copy(bundle / WEIGHTS, bundle.parent / "weights.bin")
    edit(add_file(name))
    refused(f"file {name!r} points outside the bundle; do not use this bundle")


def test_load_of_an_absolute_name_is_refused(bundle: Path, edit: Edit, refused: Refused) -> None:
    """The name is refused even if it points into the bundle."""
    name = str(bundle / WEIGHTS)
    edit(add_file(name))
    refused(f"file {name!r} points outside the bundle")


@pytest.mark.parametrize("name", ["", ".", "graphs", "graphs/"])
def test_load_of_a_name_that_is_a_folder_is_refused(edit: Edit, refused: Refused, name: str) -> None:
    edit(add_file(name))
    refused("is missing")


def test_load_of_a_name_longer_than_any_file_is_refused(edit: Edit, refused: Refused) -> None:
    name = "n" * 300
    edit(add_file(name))
    refused(f"file {name!r} cannot be read", "copy the bundle again or rebuild it")


@pytest.mark.parametrize("verify_hashes", [True, False])
def test_load_of_a_link_out_to_altered_bytes_is_refused(bundle: Path, verify_hashes: bool) -> None:
    """The hash of a file outside of the bundle is always checked."""
    outside = bundle.parent / "weights.bin"
    content = bytearray((bundle / WEIGHTS).read_bytes())
    content[-1] ^= 1
    outside.write_bytes(content)
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to(outside)
    with pytest.raises(BundleError, match=f"file {WEIGHTS}: expected SHA-256"):
        Pipeline.load(bundle, verify_hashes=verify_hashes)


def test_load_of_a_folder_that_links_out_to_altered_bytes_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / "graphs").rename(bundle.parent / "elsewhere")
    (bundle / "graphs").symlink_to("../elsewhere")
    with (bundle / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    refused(f"file {WEIGHTS}: expected ", " bytes, found ")


def test_run_of_weights_that_link_out_of_their_folder_names_the_way_out(bundle: Path) -> None:
    """ONNX Runtime does not follow such a link from a graph that is no link."""
    (bundle / WEIGHTS).rename(bundle.parent / "weights.bin")
    (bundle / WEIGHTS).symlink_to("../../weights.bin")
    with pytest.raises(BundleError, match=r"which ONNX Runtime does not follow: copy the bundle .*cp -rL"):
        Pipeline.load(bundle).sample([0], [0], steps=1)


@pytest.mark.parametrize("name", ["other.bin", ".hidden", "graph.onnx.part"])
def test_load_of_a_file_that_nothing_lists_is_refused(bundle: Path, refused: Refused, name: str) -> None:
    (bundle / "graphs" / name).touch()
    refused(f"file graphs/{name} is not among the manifest's files: remove it, or copy the bundle again")


def test_load_of_a_link_to_nothing_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to("none")
    refused(f"file {WEIGHTS} is a link to none, where no file is: copy the bundle", "cp -rL", "local_dir=")


def test_load_of_a_link_to_itself_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to("weights.bin")
    refused(WEIGHTS, "copy the bundle")


def test_load_of_a_graph_that_is_not_listed_is_refused(edit: Edit, refused: Refused) -> None:
    """Otherwise nothing would check its bytes."""
    edit(lambda content: content["files"].pop("graphs/dense.onnx"))
    refused("graphs/dense.onnx is not among the manifest's files; rebuild the bundle")


def test_load_of_weights_that_are_not_listed_is_refused(edit: Edit, refused: Refused) -> None:
    edit(lambda content: content["files"].pop(WEIGHTS))
    refused(f"file {WEIGHTS} is not among the manifest's files: remove it, or copy the bundle again")


def test_load_of_a_graph_outside_the_bundle_is_refused(edit: Edit, refused: Refused) -> None:
    edit(lambda content: content["graphs"][1].update(file="../dense.onnx"))
    refused("../dense.onnx is not among the manifest's files")
