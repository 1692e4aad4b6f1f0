"""`sg-export inspect`."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.bundle import Bundle


def shown(result: Any) -> str:
    """What a command printed, each run of blanks as one."""
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_inspect_of_checkpoint_shows_what_it_is(cli: Callable[..., Any], tiny_checkpoint: Path) -> None:
    text = shown(cli("inspect", tiny_checkpoint))
    digest = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    for part in ("tiny.safetensors", "bare", digest, "tread", "flow", "8×8×2", "16 tokens", "blocks 1 to 1"):
        assert part in text
    assert "3 blocks, width 32, 2 heads" in text
    # Kept tokens at 0, 0.25, 0.5, 0.75 and 0.9.
    assert text.endswith("0 16 0.25 12 0.5 8 0.75 4 0.9 2")


def test_inspect_of_reference_shows_its_classes(cli: Callable[..., Any]) -> None:
    text = shown(cli("inspect", "glyphs"))
    assert "62, A to 9" in text
    assert "blocks 1 to 6" in text


def test_inspect_of_checkpoint_without_route_asks_for_it(cli: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.pt", facts={"heads": 2, "prediction": "edm"})
    text = shown(cli("inspect", path))
    assert "unknown: give --route" in text
    assert "edm" in text
    assert "Tokens kept" not in text
    assert "blocks 0 to 2" in shown(cli("inspect", path, "--route", "0-2"))


def test_inspect_json_of_checkpoint_is_json(cli: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.pt", {"model_state_dict": tiny.state(), "ema_state_dict": tiny.state()}, {})
    given = ("--route", "0-2", "--heads", 4, "--prediction", "flow", "--weights", "model")
    result = cli("inspect", path, *given, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["model"]["route"] == {"start": 0, "end": 2}
    assert (content["model"]["heads"], content["model"]["prediction"]) == (4, "flow")
    assert content["source"]["weights"] == "model"


@pytest.mark.parametrize("bundle", ["tiny_bundle", "cfg_bundle", "glyphs_bundle"])
def test_inspect_of_bundle_shows_every_graph(
    bundle: str, cli: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(bundle)
    manifest = Bundle.open(path).manifest
    text = shown(cli("inspect", path))
    for graph in manifest.graphs:
        assert Path(graph.file).stem in text
        assert f"{graph.cost.linear_macs / 1e9:.4g}" in text
    expected = {
        "tiny_bundle": ["sg, sparsity 0 strong and 0.5 weak, scale 2", "40 euler steps", "batch symbolic"],
        "cfg_bundle": ["cfg, scale 1.5", "7 euler steps", "batch 3"],
        "glyphs_bundle": ["glyphs", "62, A to 9", "16×16×1"],
    }[bundle]
    assert all(part in text for part in [*expected, manifest.source.sha256[:12], "ONNX Runtime"])


def test_inspect_json_of_bundle_is_its_manifest(cli: Callable[..., Any], tiny_bundle: Path) -> None:
    result = cli("inspect", tiny_bundle, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tiny_bundle / "manifest.json").read_bytes())


def test_inspect_of_nothing_ends_with_6(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(6, "inspect", tmp_path / "missing.pt") == (
        f"{tmp_path}/missing.pt: expected a checkpoint (.pt, .pth, .safetensors) or the name of a reference model "
        f"(glyphs, glyphs-early), found nothing there"
    )


def test_inspect_of_a_folder_that_is_no_bundle_ends_with_6(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused(6, "inspect", tmp_path)
    assert message.startswith(f"{tmp_path}/manifest.json: expected the manifest of a bundle, found No such file")
