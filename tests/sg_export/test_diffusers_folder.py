"""PRX models in folders of diffusers and in files alone: what is read, and the facts of the model.

The folders are written without diffusers. `test_prx_pipelines.py` reads what diffusers writes.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prx_folders import (
    CONFIG,
    PIXEL,
    SCHEDULER,
    in_training,
    state_of,
    write_json,
    write_pipeline,
    write_shards,
    write_transformer,
)
from safetensors.torch import save_file
from torch import Tensor

from sg_export.checkpoint import Overrides, checkpoint_files, read_checkpoint
from sg_export.loading import LoadedModel, load_model, load_weak
from sg_runtime.errors import UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import Route, Sampling, Shifted, Text

SIZE = Overrides(size=(128, 192))
"""Picture of `CONFIG`, whose latents of DC-AE have a side of 32 pixels."""
PUBLISHED = Shifted(3.0, 3 / 1002)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return state_of(CONFIG)


def assert_holds(loaded: LoadedModel, state: dict[str, Tensor]) -> None:
    network = loaded.model.network
    assert isinstance(network, torch.nn.Module)
    found = network.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in state.items())


def test_load_model_of_a_pipeline_of_latents_states_the_facts(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = write_pipeline(tmp_path / "prx-512", CONFIG, state)
    loaded = load_model(folder, overrides=replace(SIZE, route=Route(0, 1)))
    assert_holds(loaded, state)
    facts = loaded.facts
    assert (facts.family, facts.prediction, facts.space) == ("prx", "flow", "latent")
    assert (facts.latent, facts.pixels_per_latent, facts.picture) == ((32, 4, 6), 32, (128, 192))
    assert (facts.patch, facts.tokens, facts.width, facts.depth, facts.heads) == (1, 24, 16, 2, 2)
    assert facts.conditions == Text(256, 5)
    assert facts.held["text_keys"] == (2, 256, 16)
    assert (facts.route, facts.masked) == (Route(0, 1), False)
    assert facts.parameters == sum(tensor.numel() for tensor in state.values())
    assert loaded.sampling == Sampling("euler", 28, PUBLISHED)
    assert (loaded.source.file, loaded.source.weights) == ("prx-512", "bare")


def test_load_model_of_a_pipeline_of_pixels_predicts_x0(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pixels", PIXEL, state_of(PIXEL), default_sample_size=32, prompt_max_tokens=7)
    loaded = load_model(folder)
    facts = loaded.facts
    assert (facts.prediction, facts.space, facts.latent, facts.pixels_per_latent) == ("x0", "pixel", (3, 32, 32), 1)
    assert facts.conditions == Text(7, 5)
    assert loaded.sampling == Sampling("euler", 28, PUBLISHED, 2.0, 0.05)


@pytest.mark.parametrize(("config", "side"), [(CONFIG, 512), (PIXEL, 1024)], ids=["latent", "pixel"])
def test_load_model_of_a_pipeline_without_a_size_takes_upstreams(config: Any, side: int, tmp_path: Path) -> None:
    loaded = load_model(write_pipeline(tmp_path / "p", config, state_of(config)))
    assert loaded.facts.picture == (side, side)


def test_load_model_of_a_pipeline_takes_its_own_numbers(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = write_pipeline(tmp_path / "p", CONFIG, state, default_sample_size=96, noise_scale=1.5)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"shift": 1.0, "num_train_timesteps": 50})
    loaded = load_model(folder)
    assert loaded.facts.picture == (96, 96)
    assert loaded.sampling == Sampling("euler", 28, Shifted(1.0, 0.02), 1.5)


@pytest.mark.parametrize(
    ("vae", "side"),
    [
        ({"_class_name": "AutoencoderKL", "latent_channels": 32, "block_out_channels": [1, 1, 1, 1]}, 8),
        ({"_class_name": "AutoencoderDC", "latent_channels": 32, "encoder_block_out_channels": [1] * 6}, 32),
    ],
    ids=["KL", "DC"],
)
def test_load_model_of_a_pipeline_knows_the_side_of_a_latent(
    vae: dict[str, Any], side: int, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    folder = write_pipeline(tmp_path / "p", CONFIG, state)
    write_json(folder / "vae" / "config.json", vae)
    facts = load_model(folder, overrides=Overrides(size=(side * 4, side * 6))).facts
    assert (facts.pixels_per_latent, facts.latent) == (side, (32, 4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [write_transformer, write_shards], ids=["file", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_load_model_of_a_transformers_folder_reads_its_weights(
    variant: str | None, write: Any, dtype: torch.dtype, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    """A variant that is alone needs no choice."""
    given = {name: tensor.to(dtype) for name, tensor in state.items()}
    loaded = load_model(write(tmp_path / "transformer", CONFIG, given, variant), overrides=SIZE)
    assert_holds(loaded, given)
    assert (loaded.source.file, loaded.source.weights) == ("transformer", variant or "bare")
    assert loaded.sampling == Sampling("euler", 28, PUBLISHED)


def test_load_model_of_several_variants_takes_the_one_without_a_name_or_by_its_name(tmp_path: Path) -> None:
    plain, half, other = (state_of(CONFIG, seed) for seed in range(3))
    write_transformer(tmp_path, CONFIG, plain)
    write_transformer(tmp_path, CONFIG, half, "fp16")
    write_shards(tmp_path, CONFIG, other, "bf16")
    assert_holds(load_model(tmp_path, overrides=SIZE), plain)
    assert_holds(load_model(tmp_path, weights="fp16", overrides=SIZE), half)
    assert_holds(load_model(tmp_path, weights="bf16", overrides=SIZE), other)


def test_read_checkpoint_of_a_folder_hashes_all_that_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = write_pipeline(tmp_path / "p", CONFIG, state)
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL"})
    read = ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"]
    files = [folder / name for name in [*read, "transformer/diffusion_pytorch_model.safetensors"]]
    assert checkpoint_files(folder).all == tuple(files)
    assert read_checkpoint(folder).source.sha256 == sha256_of(*files)


def test_read_checkpoint_of_a_folder_by_a_relative_path_has_its_name(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pipeline(tmp_path / "prx-1.2b", CONFIG, state)
    write_json(tmp_path / "prx-1.2b.json", {"route": "1-1"})
    monkeypatch.chdir(folder)
    read = read_checkpoint(".")
    assert (read.source.file, read.facts.route) == ("prx-1.2b", "1-1")


FACTS = {"size": [128, 192], "text_tokens": 3, "route": "1-1", "time_shift": 2.0, "noise_scale": 1.25}


@pytest.mark.parametrize("form", ["folder", "file", "metadata"])
def test_load_model_takes_what_the_author_states(form: str, tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    if form == "folder":
        path = write_pipeline(tmp_path / "model", CONFIG, state)
    else:
        save_file(state, path, {"sg_export": json.dumps(FACTS)} if form == "metadata" else None)
    if form != "metadata":
        write_json(tmp_path / "model.json", FACTS)
    loaded = load_model(path)
    assert (loaded.facts.picture, loaded.facts.conditions) == ((128, 192), Text(3, 5))
    assert loaded.facts.route == Route(1, 1)
    assert loaded.sampling == Sampling("euler", 28, Shifted(2.0, 2 / 1001), 1.25)
    given = load_model(path, overrides=Overrides(Route(0, 1), None, "x0", (64, 32), 9)).facts
    assert (given.route, given.prediction, given.picture, given.conditions) == (
        Route(0, 1),
        "x0",
        (64, 32),
        Text(9, 5),
    )


def test_load_model_of_a_patch_of_no_published_model_takes_what_the_author_states(tmp_path: Path) -> None:
    config = replace(CONFIG, channels=5, patch=2)
    save_file(state_of(config), tmp_path / "model.safetensors")
    facts = {"channels": 5, "patch": 2, "pixels_per_latent": 16, "size": [64, 96]}
    write_json(tmp_path / "model.json", facts)
    loaded = load_model(tmp_path / "model.safetensors")
    assert (loaded.facts.latent, loaded.facts.patch, loaded.facts.picture) == ((5, 4, 6), 2, (64, 96))


@pytest.mark.parametrize(("config", "noise"), [(CONFIG, 1.0), (PIXEL, 2.0)], ids=["latent", "pixel"])
def test_load_model_of_a_file_alone_samples_as_the_code_of_its_layout(
    config: Any, noise: float, tmp_path: Path
) -> None:
    """The training code shifts its times once, and trains with noise of deviation 1 by default."""
    state, size = state_of(config), Overrides(size=(128, 192))
    save_file(state, tmp_path / "diffusers.safetensors")
    torch.save({"denoiser." + name: tensor for name, tensor in in_training(state).items()}, tmp_path / "trained.pt")
    diffusers = load_model(tmp_path / "diffusers.safetensors", overrides=size)
    trained = load_model(tmp_path / "trained.pt", overrides=size)
    assert_holds(trained, state)
    assert diffusers.facts == trained.facts
    floor = 0.05 if config is PIXEL else 0.0
    assert diffusers.sampling == Sampling("euler", 28, PUBLISHED, noise, floor)
    assert trained.sampling == Sampling("euler", 28, Shifted(3.0, None), 1.0, floor)


EMBEDDER = "resolution_embedder."
NESTED = pytest.mark.parametrize("nested", [True, False], ids=["Composer", "flat"])


def write_trained(path: Path, plain: dict[str, Tensor], ema: dict[str, Tensor], *, nested: bool, beside: bool) -> Path:
    """Write a file of the training code.

    beside: the embedder of the resolution is next to the denoisers, as in earlier files.
    """
    outside = {name: plain[name] for name in plain if beside and name.startswith(EMBEDDER)}
    model = {f"denoiser.{name}": tensor for name, tensor in plain.items() if name not in outside} | outside
    model |= {f"ema_denoiser.model.{name}": tensor for name, tensor in ema.items() if name not in outside}
    if ema:
        model |= {"ema_denoiser._is_active": torch.tensor(True)}
    model |= {"text_tower.embed.weight": torch.ones(2, 2)}
    torch.save({"state": {"model": model}, "rng": []} if nested else model, path)
    return path


@pytest.mark.parametrize("averaged", ["all", "without the resolution", "nothing"])
@NESTED
def test_load_model_of_a_training_file_takes_averaged_weights(nested: bool, averaged: str, tmp_path: Path) -> None:
    """An earlier version of the training code does not average the embedder of the resolution."""
    plain, ema = state_of(PIXEL, 0), {} if averaged == "nothing" else state_of(PIXEL, 1)
    beside = averaged == "without the resolution"
    path = write_trained(tmp_path / "ep0.pt", in_training(plain), in_training(ema), nested=nested, beside=beside)
    expected = plain | {name: ema[name] for name in ema if not (beside and name.startswith(EMBEDDER))}
    assert_holds(load_model(path, overrides=Overrides(size=(32, 16))), expected)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("key", "seed"), [("denoiser", 0), ("ema_denoiser.model", 1)])
@NESTED
def test_load_model_of_a_training_file_by_key_has_its_embedder(
    nested: bool, key: str, seed: int, beside: bool, tmp_path: Path
) -> None:
    states = state_of(PIXEL, 0), state_of(PIXEL, 1)
    path = write_trained(tmp_path / "ep0.pt", *map(in_training, states), nested=nested, beside=beside)
    expected = states[seed] | {name: states[0][name] for name in states[0] if beside and name.startswith(EMBEDDER)}
    size = Overrides(size=(32, 16))
    assert_holds(load_model(path, weights=f"state.model.{key}" if nested else key, overrides=size), expected)


def test_load_weak_of_a_folder_takes_the_facts_of_the_strong_network(tmp_path: Path, state: dict[str, Tensor]) -> None:
    strong = load_model(write_transformer(tmp_path / "a", CONFIG, state), overrides=replace(SIZE, text_tokens=3))
    weak = load_weak(write_transformer(tmp_path / "b", CONFIG, state_of(CONFIG, 5)), strong, None)
    assert weak.facts == strong.facts
    with pytest.raises(UsageError, match=r"latent: expected \(32, 4, 6\), found \(32, 1, 1\)"):
        load_weak(tmp_path / "b", strong, None, Overrides(size=(32, 32)))
