"""`sg-export inspect`."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sg_export.compiler import compile
from sg_export.cost.step import step_costs, step_table
from sg_export.options.compile import CompileOptions
from sg_runtime.bundle import Bundle


def shown(result: Any) -> str:
    """Return the output of a command, with each run of blanks as one blank."""
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
    assert "62 classes, A to 9" in text
    assert "blocks 1 to 6" in text


def test_inspect_of_checkpoint_without_route_asks_for_it(cli: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.pt", facts={"heads": 2, "prediction": "edm"})
    text = shown(cli("inspect", path))
    assert "unknown: give --route" in text
    assert "edm" in text
    assert "Tokens kept" not in text
    assert "blocks 0 to 2" in shown(cli("inspect", path, "--route", "0-2"))


def test_inspect_with_key_reads_the_weights_under_it(cli: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.pt", {"generator": tiny.state(), "critic": tiny.state(2)})
    result = cli("inspect", path, "--key", "generator", "--json")
    assert json.loads(result.stdout)["source"]["weights"] == "generator"
    result = cli("inspect", path, "--key", "generator", "--weights", "ema")
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: --weights: found with --key generator: leave out one of them\n",
    )


def test_inspect_json_of_checkpoint_is_json(cli: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.pt", {"model_state_dict": tiny.state(), "ema_state_dict": tiny.state()}, {})
    given = ("--route", "0-2", "--heads", 4, "--prediction", "flow", "--weights", "model")
    result = cli("inspect", path, *given, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["model"]["route"] == {"start": 0, "end": 2}
    assert (content["model"]["heads"], content["model"]["prediction"]) == (4, "flow")
    assert content["source"]["weights"] == "model"


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_cfg_bundle", "glyphs_bundle"])
def test_inspect_of_bundle_shows_every_graph(
    bundle: str, cli: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(bundle)
    manifest = Bundle.open(path).manifest
    text = shown(cli("inspect", path))
    for graph in manifest.graphs:
        assert graph.name in text
        assert f"{graph.cost.linear_macs / 1e9:.4g}" in text
    expected = {
        "tiny_bundle": ["sg, sparsity 0 strong and 0.5 weak, scale 2", "40 euler steps", "batch symbolic"],
        "tiny_cfg_bundle": ["cfg, scale 1.5", "40 euler steps", "batch 3"],
        "glyphs_bundle": ["glyphs", "62 classes, A to 9", "16×16×1"],
    }[bundle]
    assert all(part in text for part in [*expected, manifest.source.sha256[:12], "precision fp32", "ONNX Runtime, CPU"])


def test_inspect_json_of_bundle_is_its_manifest_and_what_a_run_does(cli: Callable[..., Any], tiny_bundle: Path) -> None:
    result = cli("inspect", tiny_bundle, "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["manifest"] == json.loads((tiny_bundle / "manifest.json").read_bytes())
    assert [cost["way"] for cost in content["step_costs"]] == ["unguided", "CFG", "two passes", "this bundle"]
    strong, weak = {"sparsity": 0.0, "keep": 16}, {"sparsity": 0.5, "keep": 8}
    assert content["step_guidance"] == [{"strong": strong, "weak": weak, "scale": 2.0}] * 40


def test_inspect_of_bundle_shows_the_cost_of_a_step(cli: Callable[..., Any], tiny_bundle: Path) -> None:
    text = shown(cli("inspect", tiny_bundle))
    for cost in step_costs(Bundle.open(tiny_bundle).manifest):
        total = (cost.linear_macs + cost.condition_macs) / 1e9
        assert f"{cost.way} {cost.linear_macs / 1e9:.4g} {cost.condition_macs / 1e9:.4g} {total:.4g}" in text
    assert "published" not in text
    assert "Guidance over a default run" not in text  # guidance is the same in every step


def test_inspect_of_a_schedule_shows_the_steps_of_each_pair(cli: Callable[..., Any], tiny_cosine_bundle: Path) -> None:
    manifest = Bundle.open(tiny_cosine_bundle).manifest
    text = shown(cli("inspect", tiny_cosine_bundle))
    plan = manifest.guidance
    assert plan.weak_last is not None
    assert f"{plan.weak.sparsity:g} to {plan.weak_last.sparsity:g} weak" in text
    shown_table = text[text.index("Guidance over a default run") : text.index("Cost of an evaluation")]
    table = step_table(manifest)
    (place,) = [k for k, step in enumerate(table) if step.strong.keep == 16 and step.weak == plan.weak and k > 0][:1]
    assert f"{place}-" in shown_table
    for step in table:
        assert (
            f" {step.strong.sparsity:g} {'-' if step.weak is None else format(step.weak.sparsity, 'g')} " in shown_table
        )


def test_inspect_of_an_interval_shows_where_the_strong_branch_runs_alone(
    cli: Callable[..., Any], quick_checkpoint: Path, tmp_path: Path
) -> None:
    options = CompileOptions(tmp_path / "bundle", (0.5,), scale=(1.0, 3.0), interval=(0.3, 0.7), steps=10)
    text = shown(cli("inspect", compile(quick_checkpoint, options).path))
    assert "scale 1 to 3, between times 0.3 and 0.7" in text
    # Times 1, 0.9 and 0.8 lie above the interval; 0.2 and 0.1 lie below it.
    assert "0-2 0 - - 3-7 0 0.5 1.5 to 2.766 8-9 0 - -" in text


def test_inspect_of_few_tokens_shows_a_sparsity_that_keeps_none(
    cli: Callable[..., Any], tiny_masked: Any, tmp_path: Path
) -> None:
    config = replace(tiny_masked.config, image_size=4)
    few = replace(tiny_masked, config=config)
    assert shown(cli("inspect", few.save(tmp_path / "few.pt"))).endswith("0.75 1 0.9 0")


def test_inspect_of_nothing_ends_with_6(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(6, "inspect", tmp_path / "missing.pt") == (
        f"{tmp_path}/missing.pt: expected a checkpoint file, a folder of diffusers or the name of a reference model "
        f"(glyphs, glyphs-early, scenes), found nothing there"
    )


def test_inspect_of_a_folder_that_is_no_bundle_ends_with_6(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused(6, "inspect", tmp_path)
    assert message.startswith(f"{tmp_path}/manifest.json: expected the manifest of a bundle, found No such file")
