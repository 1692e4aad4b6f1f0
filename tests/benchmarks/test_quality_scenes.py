"""The kept figures of `quality_scenes`, its report, and what the quantized run takes from it."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from benchmarks.guidance_grid import Setting
from benchmarks.quality_scenes import Sampler, decoded
from benchmarks.quality_scenes_quantized import check_source, settings_of
from benchmarks.scene_judge import CATEGORIES, Figures, Judge, draw_captions, real_pictures
from benchmarks.scene_reader import Reader
from benchmarks.scene_report import Report, Row, to_json, to_markdown
from sg_export.reference import place_of
from sg_runtime import Pipeline

CFG = Setting("cfg", 3.0)


def row(setting: Setting | None, *accuracies: float) -> Row:
    figures = tuple(Figures(dict.fromkeys(CATEGORIES, share), 0.5, 60.0, 20.0) for share in accuracies)
    if setting is None:
        return Row("drawn scenes", None, None, (), figures)
    return Row(setting.name, asdict(setting), 0.25, (0.5,) * len(figures), figures)


def report() -> Report:
    return Report(
        machine={"processor": "a processor", "cores": 2, "versions": {"python": "3"}},
        checkpoints={"main": {"name": "late", "sha256": "aa"}, "weak": {"name": "early", "sha256": "bb"}},
        compiled_by="sg-export",
        protocol={"steps": 20, "pictures": 20, "each": 2, "captions": 1, "blocks": (1, 2), "batch": 32, "drawings": 4}
        | {"searched": 2},
        measured=(row(CFG, 0.5, 0.75), row(None, 1.0, 1.0)),
        searched=(row(CFG, 0.5), row(Setting("cfg", 2.0), 0.25), row(None, 1.0)),
        hours=1.25,
    )


def test_to_json_rows_gain_mean_and_deviation() -> None:
    first = json.loads(to_json(report()))["measured"][0]
    assert first["mean"]["all"] == 62.5
    assert first["deviation"]["composition"] == pytest.approx(100 * 0.25 / 2**0.5)


def test_to_markdown_names_checkpoints_and_marks_the_chosen() -> None:
    text = to_markdown(report())
    assert "Checkpoint: late, SHA-256 `aa`, compiled by sg-export; weak branch of AutoGuidance: early" in text
    assert "| CFG, ω = 3 | 0.250 | 2.0 ± 0.0 | 62.5 ± 17.7 |" in text
    assert "| **CFG, ω = 3** | 0.250 | 2.0 | 50.0 |" in text
    assert "| CFG, ω = 2 | 0.250 |" in text
    assert "| drawn scenes | – | – | 100.0 |" in text
    assert "standard error of up to 11.2 points" in text


def test_settings_of_are_the_best_of_each_mode() -> None:
    settings = [Setting("none"), Setting("none", 1.0, 0.5), CFG, Setting("sg", 2.0, 0.5, 0.9)]
    measured = [row(setting, share) for setting, share in zip(settings, (0.1, 0.2, 0.3, 0.4), strict=True)]
    results = json.loads(to_json(replace(report(), measured=(*measured, row(None, 1.0)))))
    assert settings_of(results) == tuple(settings[1:])


@pytest.fixture(scope="module")
def pipe(build_once: Callable[..., Path]) -> Pipeline:
    return Pipeline.load(build_once("scenes", "scenes", guidance="cfg", batch=1, scale=3.0))


@pytest.mark.slow
def test_figures_of_a_set_are_kept_for_the_same_judge(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    reader, captions = Reader().eval(), draw_captions(1, 7)
    judge = Judge.of(reader, captions, drawings=4)
    sampler = Sampler({"cfg": pipe}, tmp_path / "sets.json", steps=1)
    (found,), seconds = sampler.rows([CFG], judge, 2, [1, 2])
    assert (found.name, len(found.figures), len(found.seconds)) == ("CFG, ω = 3", 2, 2)
    assert found.figures[0] != found.figures[1]
    assert seconds == pytest.approx(sum(found.seconds) * 20)

    def again(*arguments: Any) -> Any:
        raise AssertionError("sampled again")

    monkeypatch.setattr(Sampler, "_samples", again)
    assert sampler.rows([CFG], judge, 2, [1, 2]) == ((found,), seconds)
    with pytest.raises(AssertionError, match="sampled again"):
        sampler.rows([CFG], Judge.of(reader, captions, drawings=5), 2, [1])


@pytest.mark.slow
def test_source_of_other_weights_is_refused(pipe: Pipeline) -> None:
    manifest = pipe.bundle.manifest
    check_source(manifest, {"checkpoints": {"main": {"sha256": manifest.source.sha256}}})
    with pytest.raises(SystemExit, match="expected the weights of"):
        check_source(manifest, {"checkpoints": {"main": {"sha256": "aa"}}})


@pytest.mark.slow
def test_decoded_pictures_are_near_the_drawn_ones() -> None:
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(place_of("scenes"), subfolder="vae").float().eval()
    pictures = real_pictures(draw_captions(1, 7), 1, 9)
    found = decoded(autoencoder, pictures)
    assert found.shape == pictures.shape
    assert found.dtype == np.uint8
    assert 0 < np.abs(found.astype(int) - pictures).mean() < 10
