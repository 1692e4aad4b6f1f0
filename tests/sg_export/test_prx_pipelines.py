"""PRX folders that diffusers writes, and runs of its pipelines.

They need the extra `diffusers`. `test_diffusers_folder.py` has the same without it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prx_folders import CONFIG, PIXEL, state_of, transformer_config

from sg_export.checkpoint import Overrides
from sg_export.loading import load_model
from sg_export.models.prx import PRXConfig
from sg_runtime.sampling import integrate, precondition, trajectory

diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")

STEPS = 6
PROMPT_TOKENS = 3


def pipeline_of(config: PRXConfig, shift: float = 3.0) -> Any:
    """Return a pipeline with random weights and without text encoder."""
    arguments = {name: value for name, value in transformer_config(config).items() if name[0] != "_"}
    transformer = diffusers.PRXTransformer2DModel(**arguments).eval()
    transformer.load_state_dict(state_of(config))
    transformer.set_attention_backend("_native_math")
    kind = diffusers.PRXPixelPipeline if config is PIXEL else diffusers.PRXPipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline = kind(transformer=transformer, scheduler=scheduler, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("config", [CONFIG, PIXEL], ids=["latent", "pixel"])
def test_load_model_of_what_save_pretrained_writes(
    config: PRXConfig, variant: str | None, shards: bool, tmp_path: Path
) -> None:
    pipeline = pipeline_of(config)
    size = "4KB" if shards else "10GB"
    pipeline.save_pretrained(tmp_path / "prx", variant=variant, max_shard_size=size)
    files = list((tmp_path / "prx" / "transformer").glob("*.safetensors"))
    assert (len(files) > 1) == shards
    for folder in (tmp_path / "prx", tmp_path / "prx" / "transformer"):
        loaded = load_model(folder, overrides=Overrides(size=(64, 96)))
        found = loaded.model.network.state_dict()  # type: ignore[attr-defined]  # a network is a module
        expected = pipeline.transformer.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert loaded.source.weights == (variant or "bare")
        assert loaded.facts.prediction == ("x0" if config is PIXEL else "flow")
        assert loaded.sampling.noise_scale == (2.0 if config is PIXEL else 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("config", [CONFIG, PIXEL], ids=["latent", "pixel"])
def test_run_of_a_pipeline_is_its_trajectory(config: PRXConfig, shift: float, tmp_path: Path) -> None:
    """Times, velocity of x0 with its floor, noise scale and Euler's method are upstream's.

    Both run the network in FP32, and sum in another order.
    """
    pipeline = pipeline_of(config, shift)
    pipeline.save_pretrained(tmp_path / "prx")
    side = 1 if config is PIXEL else 8  # a pipeline without autoencoder decodes by 8
    latent = tuple(config.image_size)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, PROMPT_TOKENS, config.context, generator=generator)
    mask = torch.tensor([[True, True, False]])
    noise = torch.randn(1, config.channels, *latent, generator=generator)
    expected = pipeline(
        height=latent[0] * side,
        width=latent[1] * side,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        # Pixels: upstream scales its own noise, but takes given latents as they are.
        latents=noise * (2.0 if config is PIXEL else 1.0),
        prompt_embeds=embeddings,
        prompt_attention_mask=mask,
        output_type="latent",
        use_resolution_binning=False,
    ).images.numpy()
    per = 1 if config is PIXEL else 32
    loaded = load_model(
        tmp_path / "prx", overrides=Overrides(size=(latent[0] * per, latent[1] * per), text_tokens=PROMPT_TOKENS)
    )
    model, prediction = loaded.model, loaded.facts.prediction
    path = trajectory(replace(loaded.sampling, steps=STEPS), prediction)

    def advance(index: int, x: Any, r: Any) -> Any:
        update = path.updates[index]
        t = torch.tensor([precondition(prediction, update.time).t])
        with torch.no_grad():
            output = model(torch.from_numpy(x), t, {"embeddings": embeddings, "mask": mask.long()}).numpy()
        return update.next(x, output, r)

    found = integrate(path.updates, advance, np.float32(path.start) * noise.numpy())
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(expected - noise.numpy()) > 0.1 * np.linalg.norm(expected)
