"""Check that the sdist and the wheel are complete, and that the wheel alone can build a bundle."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "sg_export": ROOT / "sg_export",
    "sg_engines": ROOT / "engines/sg_engines",
    "sg_runtime": ROOT / "runtime/sg_runtime",
    "sg_calibration": ROOT / "calibration/sg_calibration",
}
# Files that hatchling adds by default, and files that pyproject.toml names.
SDIST = {
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "PKG-INFO",
    "README.md",
    "THIRD_PARTY_NOTICES.md",
    "benchmarks",
    "calibration",
    "constraints.txt",
    "docs",
    "engines",
    "examples",
    "pyproject.toml",
    "runtime",
    "sg_export",
    "tests",
}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside of this checkout. Returns its stdout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the wheel and the current other packages.

    A .pth file adds the other packages. Python does not read the .pth files of a folder that was
    added this way, so an editable install of this checkout is not visible.
    """
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(here)) + "\n")
    return python


def test_sdist_holds_only_the_project(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {PurePosixPath(name).parts[1] for name in archive.getnames()}
    assert names <= SDIST
    assert names >= {"LICENSE", "THIRD_PARTY_NOTICES.md", "pyproject.toml", "sg_export", "tests"}


def test_wheel_holds_the_packages_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {PurePosixPath(name).parts[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == set(ROOMS)


def test_wheel_holds_every_module_and_the_data(wheel: Path) -> None:
    expected = {
        f"{room}/{file.relative_to(folder).as_posix()}"
        for room, folder in ROOMS.items()
        for file in folder.rglob("*.py")
    }
    expected |= {f"{room}/py.typed" for room in ROOMS}
    expected |= {f"sg_export/reference/{name}.safetensors" for name in ("glyphs", "glyphs-early")}
    scenes = ROOT / "sg_export" / "reference" / "scenes"
    expected |= {file.relative_to(ROOT).as_posix() for file in scenes.rglob("*.*")}
    expected |= {"sg_runtime/manifest/schema.json"}
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


def test_wheel_carries_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0\n" in archive.read(metadata).decode()
        folder = PurePosixPath(metadata).parent / "licenses"
        assert archive.read(f"{folder}/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert archive.read(f"{folder}/THIRD_PARTY_NOTICES.md") == (ROOT / "THIRD_PARTY_NOTICES.md").read_bytes()


def test_packages_of_installed_wheel_are_not_this_checkout(python: Path, tmp_path: Path) -> None:
    code = f"import {', '.join(ROOMS)}; print(*(module.__file__ for module in ({', '.join(ROOMS)})), sep='\\n')"
    files = [Path(line) for line in run(python, "-c", code, cwd=tmp_path).split()]
    environment = python.parent.parent
    assert [file.parent.name for file in files] == list(ROOMS)
    assert all(file.is_relative_to(environment) for file in files), files


@pytest.mark.slow
def test_installed_wheel_builds_a_bundle(python: Path, tmp_path: Path) -> None:
    run(python, "-m", "sg_export", "build", "--sparsity", "0.5", "--batch", "1", "-o", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "manifest.json").is_file()
