"""Bundles of PRX folders: the same folder gives the same model again."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prx_folders import PIXEL, SCHEDULER, state_of, write_json, write_pipeline

from sg_export.checkpoint import Overrides
from sg_export.cli import main
from sg_export.loading import reload_checkpoint
from sg_export.options.compile import CompileOptions
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, CheckpointError, UsageError
from sg_runtime.manifest import Route, Sampling, Shifted


@pytest.fixture(scope="session")
def prx_folder(once: Callable[..., Path]) -> Path:
    """Return a pipeline folder of pixels, 32×48 in tokens of 16×16."""
    return once("prx-pixels", lambda path: write_pipeline(path, PIXEL, state_of(PIXEL), default_sample_size=512))


@pytest.fixture(scope="session")
def prx_bundle(prx_folder: Path, build_once: Callable[..., Path]) -> Path:
    """Return a bundle of the folder without guidance, next to it."""
    overrides = Overrides(Route(0, 0), size=(32, 48), text_tokens=3)
    return build_once("prx-bundle", prx_folder, guidance="none", steps=5, overrides=overrides)


@pytest.fixture
def copy(prx_folder: Path, prx_bundle: Path, tmp_path: Path) -> Bundle:
    """Return a bundle with its folder next to it, which a test may change."""
    shutil.copytree(prx_folder, tmp_path / prx_folder.name)
    shutil.copytree(prx_bundle, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_compile_of_a_folder_stores_its_conventions(prx_bundle: Path) -> None:
    manifest = Bundle.open(prx_bundle).manifest
    assert manifest.sampling == Sampling("euler", 5, Shifted(3.0, 3 / 1002), 2.0, 0.05)
    assert (manifest.source.file, manifest.source.weights) == ("prx-pixels", "bare")
    assert manifest.model.picture == (32, 48)


def test_reload_checkpoint_finds_the_folder_next_to_the_bundle(copy: Bundle) -> None:
    assert reload_checkpoint(copy, None).facts == copy.manifest.model


@pytest.mark.parametrize("part", ["model_index.json", "scheduler/scheduler_config.json"])
def test_reload_checkpoint_of_a_changed_configuration_is_refused(part: str, copy: Bundle) -> None:
    path = copy.path.parent / "prx-pixels" / part
    path.write_text(path.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"expected SHA-256 .*: give that checkpoint, or build a new bundle"):
        reload_checkpoint(copy, None)


def test_reload_checkpoint_of_a_manifest_with_other_times_is_refused(copy: Bundle) -> None:
    sampling = replace(copy.manifest.sampling, times=Shifted(2.0, None))
    with pytest.raises(BundleError, match="its manifest describes another model than prx-pixels: build it again"):
        reload_checkpoint(replace(copy, manifest=replace(copy.manifest, sampling=sampling)), None)


def test_reload_checkpoint_of_a_folder_that_is_no_longer_a_prx_is_refused(copy: Bundle) -> None:
    write_json(copy.path.parent / "prx-pixels" / "model_index.json", {"_class_name": "FluxPipeline"})
    with pytest.raises(CheckpointError, match="expected PRXPipeline or PRXPixelPipeline, found FluxPipeline"):
        reload_checkpoint(copy, None)


def test_build_command_of_a_prx_asks_for_the_same_model(prx_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(prx_bundle).manifest
    asked: list[CompileOptions] = []

    def stop(model: str, options: CompileOptions, report: Any) -> None:
        asked.append(options)
        raise UsageError("far enough")

    monkeypatch.setattr("sg_export.compiler.compile", stop)
    result = CliRunner().invoke(main, shlex.split(build_command(manifest, "out"))[1:])
    assert "far enough" in result.output, result.output
    assert asked[0].overrides == Overrides(Route(0, 0), 2, "x0", (32, 48), 3)


@pytest.mark.parametrize(("name", "output"), [("prx-1.2b", "prx-1.2b-bundle"), ("latest.pt", "latest-bundle")])
def test_build_names_the_bundle_by_the_folder(
    name: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def stop(model: str, options: CompileOptions, report: Any) -> None:
        asked.append(options.output)
        raise UsageError("far enough")

    monkeypatch.setattr("sg_export.compiler.compile", stop)
    monkeypatch.chdir(tmp_path)
    if name == "prx-1.2b":
        write_pipeline(Path(name), PIXEL, state_of(PIXEL))
    CliRunner().invoke(main, ["build", name])
    assert asked == [Path(output)]


def test_build_without_a_route_proposes_the_usual_one(tmp_path: Path) -> None:
    config = replace(PIXEL, depth=16)
    folder = write_pipeline(tmp_path / "prx", config, state_of(config), default_sample_size=32)
    result = CliRunner().invoke(main, ["build", str(folder), "--sparsity", "0.5", "-o", str(tmp_path / "bundle")])
    assert result.exit_code == 2
    assert "give --route START-END, both blocks included; upstream's route for 16 blocks is 2-12" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_build_into_a_folder_that_it_reads_is_refused(prx_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prx_folder, tmp_path / "pixels")
    result = CliRunner().invoke(main, ["build", str(folder), "--size", "32x32", "-o", str(folder), "--force"])
    assert result.exit_code == 2
    assert "which this build reads: give another --output" in result.stderr
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes()) == SCHEDULER


def test_inspect_shows_the_picture_and_the_text(tmp_path: Path, prx_folder: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(prx_folder), "--size", "32x48", "--text-tokens", "7", "--json"])
    model = json.loads(result.stdout)["model"]
    assert model["latent"] == [3, 32, 48]
    assert model["conditions"] == {"tokens": 7, "width": 5}
