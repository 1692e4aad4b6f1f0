"""The folder of a bundle: what may be replaced, and what a build leaves."""

import json
from pathlib import Path

import pytest

from sg_export.packing.folder import check_output
from sg_runtime.errors import UsageError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with the files of a bundle, among them the results of verify."""
    folder = tmp_path / "bundle"
    (folder / "graphs").mkdir(parents=True)
    listed = ("graphs/dense.onnx", "graphs/weights.bin")
    for name in (*listed, "verify.json"):
        (folder / name).write_text("")
    manifest = {"created_by": "sg-export 0", "files": dict.fromkeys(listed)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_check_output_of_a_whole_bundle_passes_with_force_alone(bundle: Path) -> None:
    check_output(bundle, force=True)
    with pytest.raises(UsageError, match="bundle: exists: give another --output, or --force to replace it"):
        check_output(bundle, force=False)


@pytest.mark.parametrize(
    ("foreign", "found"),
    [
        (("notes.txt",), "notes.txt"),
        (("last.pt", "parity/dense.json", "parity/outputs/dense.npz"), "last.pt, parity"),
        (("graphs/mine.onnx", ".git/config"), ".git, graphs/mine.onnx"),
        (("graphs/dense/notes.txt",), "graphs/dense"),
        ([f"sample-{k}.png" for k in range(9)], ", ".join(f"sample-{k}.png" for k in range(8)) + " and 1 more"),
    ],
)
def test_check_output_of_a_bundle_with_foreign_files_names_them(
    foreign: tuple[str, ...], found: str, bundle: Path
) -> None:
    for name in foreign:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("mine")
    with pytest.raises(UsageError) as caught:
        check_output(bundle, force=True)
    assert str(caught.value) == (
        f"{bundle}: expected only files of the bundle, found {found}: --force would delete them: move them, or give "
        f"another --output"
    )


def test_check_output_of_a_bundle_with_a_link_names_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (bundle / "data").symlink_to("../data")
    with pytest.raises(UsageError, match="found data: --force would delete them"):
        check_output(bundle, force=True)


@pytest.mark.parametrize("name", [".", "manifest.json", "last.pt"])
def test_check_output_that_holds_an_input_raises(name: str, bundle: Path) -> None:
    """An input is refused also if it is the bundle itself (--like) or one of its own files."""
    with pytest.raises(UsageError, match=r"bundle: holds .*, which this build reads: give another --output"):
        check_output(bundle, force=True, inputs=[bundle / name])
    check_output(bundle, force=True, inputs=[bundle.parent / "last.pt"])
