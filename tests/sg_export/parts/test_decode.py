"""Decoders of autoencoders that diffusers writes, compared with its own decoding."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_pipelines import FULL, autoencoder
from prx_folders import write_json
from safetensors.torch import load_file, save_file

from sg_export.parts.decode import EARLIER, load_decoder
from sg_runtime.errors import CheckpointError, MissingExtraError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import ModelFacts

pytestmark = pytest.mark.slow

pytest.importorskip("diffusers", reason="needs the extra diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
LATENTS = torch.randn(1, FULL.channels, *FULL.image_size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vae(folder: Path, tmp_path: Path) -> Path:
    """A copy of the autoencoder's folder, to be changed."""
    return Path(shutil.copytree(folder / "vae", tmp_path / "vae"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    write_json(path, json.loads(path.read_bytes()) | values)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_load_decoder_is_the_decoding_of_a_pipeline(kind: str, tmp_path: Path, facts: ModelFacts) -> None:
    """As in `PRXPipeline.__call__`: latents / scaling + shift, then the autoencoder."""
    theirs = autoencoder(kind)
    theirs.save_pretrained(tmp_path)
    loaded = load_decoder(tmp_path, facts)
    shift = theirs.config.get("shift_factor") or 0.0
    expected = theirs.decode(LATENTS / theirs.config.scaling_factor + shift, return_dict=False)[0]
    found = loaded.module(LATENTS)
    assert found.shape == (1, 3, 64, 64)
    assert torch.equal(found, expected)
    assert loaded.pixels_per_latent == 8
    assert not any("encoder" in name.split(".")[:2] for name in loaded.module.state_dict())
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in loaded.module.parameters())


def test_load_decoder_of_a_pipeline_is_that_of_its_autoencoder(folder: Path, facts: ModelFacts) -> None:
    whole, alone = load_decoder(folder, facts), load_decoder(folder / "vae", facts)
    assert torch.equal(whole.module(LATENTS), alone.module(LATENTS))
    files = (folder / "vae" / "config.json", folder / "vae" / WEIGHTS)
    assert whole.source.sha256 == alone.source.sha256 == sha256_of(*files)
    assert (whole.source.file, alone.source.file) == (folder.name, "vae")


def test_load_decoder_serves_class_conditional_models(tmp_path: Path, facts: ModelFacts) -> None:
    """Stable Diffusion's autoencoder: 4 channels, a convolution before the decoder, no shift."""
    more = {"scaling_factor": 0.18215, "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
    theirs = autoencoder(channels=4, **more)
    theirs.save_pretrained(tmp_path)
    latents = LATENTS[:, :4]
    unknown = replace(facts, latent=(4, 8, 8), pixels_per_latent=None)
    loaded = load_decoder(tmp_path, unknown)
    assert torch.equal(loaded.module(latents), theirs.decode(latents / 0.18215, return_dict=False)[0])
    assert loaded.pixels_per_latent == 8


def test_load_decoder_reads_the_names_of_early_files(vae: Path, facts: ModelFacts) -> None:
    expected = load_decoder(vae, facts).module(LATENTS)
    state, now = load_file(vae / WEIGHTS), {new: old for old, new in EARLIER.items()}
    early = {}
    for name, tensor in state.items():
        for new, old in now.items():
            name = name.replace(f".{new}.", f".{old}.")
        early[name] = tensor
    assert early.keys() != state.keys()
    save_file(early, vae / WEIGHTS)
    assert torch.equal(load_decoder(vae, facts).module(LATENTS), expected)


@pytest.mark.parametrize(("variant", "size"), [(None, "20KB"), ("fp16", "20KB"), ("fp16", "1GB")])
def test_load_decoder_reads_shards_variants_and_types(
    variant: str | None, size: str, tmp_path: Path, facts: ModelFacts
) -> None:
    saved = autoencoder().half()
    saved.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (size == "20KB")
    loaded = load_decoder(tmp_path, facts, variant)
    found = loaded.module.state_dict()
    expected = {f"vae.{name}": tensor for name, tensor in saved.state_dict().items() if name.startswith("decoder.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())
    assert loaded.source.weights == (variant or "bare")


def refusal(folder: Path, facts: ModelFacts, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        load_decoder(folder, facts)
    return str(caught.value).replace(f"{folder}/", "").replace(f"{folder}", "FOLDER")


def test_load_decoder_of_a_folder_without_an_autoencoder_says_so(
    folder: Path, tmp_path: Path, facts: ModelFacts
) -> None:
    pipeline = Path(shutil.copytree(folder, tmp_path / "prx"))
    shutil.rmtree(pipeline / "vae")
    assert refusal(pipeline, facts) == (
        "FOLDER: expected vae/config.json of AutoencoderKL or AutoencoderDC, found none: give the folder of its "
        "autoencoder"
    )
    assert refusal(tmp_path / "none", facts) == (
        "FOLDER: expected config.json of AutoencoderKL or AutoencoderDC, found nothing there"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"_class_name": "AutoencoderTiny"},
            "_class_name: expected AutoencoderKL or AutoencoderDC, found AutoencoderTiny",
        ),
        ({"latent_channels": 4}, "latent_channels: expected 16, as in the model, found 4"),
        (
            {"block_out_channels": [4, 8, 8]},
            "expected an autoencoder of 8 pixels per latent, as in the model, found 4: give the one that the model was "
            "trained with",
        ),
        ({"scaling_factor": 0}, "scaling_factor: expected a number, found 0"),
        ({"shift_factor": "0.1"}, "shift_factor: expected a number, found '0.1'"),
        ({"out_channels": 4}, "expected pictures of 3 channels, found 4"),
    ],
)
def test_load_decoder_of_a_configuration_that_does_not_fit_says_so(
    values: dict[str, Any], message: str, vae: Path, facts: ModelFacts
) -> None:
    edit(vae, **values)
    assert refusal(vae, facts) == f"config.json: {message}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_per_block": 2}, "FOLDER: expected the tensors of its config.json, found no decoder."),
        ({"use_post_quant_conv": True}, "FOLDER: expected the tensors of its config.json, found no post_quant_conv."),
        (
            {"mid_block_add_attention": False},
            "FOLDER: expected the tensors of its config.json, found the unknown decoder.",
        ),
        (
            {"block_out_channels": [6, 8, 8, 8]},
            "FOLDER: decoder.up_blocks.3.resnets.0.conv1.weight: expected numbers of shape (6, 8, 3, 3), as",
        ),
        ({"norm_num_groups": 3}, "config.json: diffusers 0."),
        ({"up_block_types": ["NoSuchBlock"] * 4}, "config.json: diffusers 0."),
    ],
)
def test_load_decoder_of_weights_that_do_not_fit_says_so(
    values: dict[str, Any], message: str, vae: Path, facts: ModelFacts
) -> None:
    edit(vae, **values)
    assert refusal(vae, facts).startswith(message)


def test_load_decoder_for_a_model_of_pixels_says_so(vae: Path, facts: ModelFacts) -> None:
    pixels = replace(facts, space="pixel")
    assert refusal(vae, pixels, UsageError) == "FOLDER: expected a model of latents, found prx, a model of pixels"


def test_load_decoder_without_diffusers_names_the_extra(
    vae: Path, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    expected = "diffusers is not installed: pip install -e '.[diffusers]' in a checkout of sg-export"
    assert refusal(vae, facts, MissingExtraError) == expected
