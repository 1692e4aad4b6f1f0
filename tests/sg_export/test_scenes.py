"""The reference model `scenes`: its folder in diffusers, and a bundle of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sg_export.reference import place_of
from sg_runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow

PROMPT = "a fox left of an apple on blue"
STEPS = 3


@pytest.fixture(scope="module")
def pipe(build_once: Callable[..., Path]) -> Pipeline:
    return Pipeline.load(build_once("scenes", "scenes", guidance="cfg", batch=1, scale=3.0))


@pytest.fixture(scope="module")
def upstream() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
    made = diffusers.PRXPipeline.from_pretrained(place_of("scenes")).to(torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("mode", "scale"), [("none", 1.0), ("cfg", 3.0)])
def test_picture_equals_that_of_diffusers(pipe: Pipeline, upstream: Any, mode: Any, scale: float) -> None:
    noise = pipe.initial_noise([7])
    wanted = upstream(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=torch.from_numpy(noise),
        use_resolution_binning=False,
        output_type="np",
    ).images
    guidance = pipe.guidance(mode, scale=scale)
    found = pipe(prompts=[PROMPT], seeds=[7], steps=STEPS, guidance=guidance)
    assert found.shape == (1, 64, 64, 3)
    assert np.abs(found.astype(int) - np.rint(wanted * 255)).max() <= 1


def test_prompts_of_any_words_are_read(pipe: Pipeline) -> None:
    """A word that the model does not know has a token of its own."""
    known, unknown = pipe.encode([PROMPT, "a tram left of an apple on blue"])[0]
    assert (known != unknown).any()


def test_training_is_recorded_next_to_the_folder() -> None:
    folder = place_of("scenes")
    facts = json.loads(Path(f"{folder}.json").read_bytes())
    assert facts["route"] == "1-6"
    assert facts["training"]["steps"] > 0
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 20e6
