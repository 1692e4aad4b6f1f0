"""PRX folders and files with one fault each. Each is refused with the reason and an exit code."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from prx_folders import (
    CONFIG,
    PIXEL,
    SCHEDULER,
    in_training,
    state_of,
    transformer_config,
    write_json,
    write_pipeline,
    write_shards,
    write_transformer,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from sg_export.cli import main
from sg_export.loading import load_model
from sg_runtime.errors import CheckpointError


def refusal(path: Path, *options: str, exit_code: int = 6) -> str:
    """Return the error of `sg-export inspect`."""
    result = CliRunner().invoke(main, ["inspect", str(path), *options])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    message = result.stderr.removeprefix("Error: ").rstrip("\n")
    assert message.startswith((str(path), path.name)), message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return state_of(CONFIG)


@pytest.fixture
def pipeline(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    return write_pipeline(tmp_path / "prx", CONFIG, state)


@pytest.fixture
def shards(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    return write_shards(tmp_path / "transformer", CONFIG, state)


def edit(path: Path, **change: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_bytes()) | change
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_pipeline_is_accepted_as_it_is(pipeline: Path) -> None:
    assert CliRunner().invoke(main, ["inspect", str(pipeline)]).exit_code == 0


# Folders that are no PRX


@pytest.mark.parametrize(
    ("found", "shown"), [("StableDiffusionPipeline", "StableDiffusionPipeline"), (None, "a class that is not stated")]
)
def test_pipeline_of_another_class_is_refused(found: str | None, shown: str, pipeline: Path) -> None:
    edit(pipeline / "model_index.json", _class_name=found)
    message = refusal(pipeline)
    assert message.endswith(f"model_index.json: _class_name: expected PRXPipeline or PRXPixelPipeline, found {shown}")


@pytest.mark.parametrize("place", ["prx", "prx/transformer"])
def test_transformer_of_another_class_is_refused(place: str, pipeline: Path) -> None:
    edit(pipeline / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    message = refusal(pipeline.parent / place)
    assert message.endswith(
        "transformer/config.json: _class_name: expected PRXTransformer2DModel, found FluxTransformer2DModel"
    )


def test_folder_of_another_component_is_refused(pipeline: Path) -> None:
    with pytest.raises(CheckpointError, match=f"found a part of a Diffusers pipeline: give its folder, {pipeline}$"):
        load_model(pipeline / "scheduler")
    write_json(pipeline / "vae" / "config.json", {"_class_name": "AutoencoderKL"})
    assert refusal(pipeline / "vae").endswith("_class_name: expected PRXTransformer2DModel, found AutoencoderKL")


def test_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    expected = "expected a checkpoint file, or a folder of diffusers with model_index.json or config.json, found "
    with pytest.raises(CheckpointError, match=f"{expected}a folder of notes.txt$"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(CheckpointError, match=f"{expected}an empty folder$"):
        load_model(tmp_path)


def test_configuration_in_place_of_its_folder_is_refused(pipeline: Path) -> None:
    message = refusal(pipeline / "model_index.json")
    assert "found the configuration of a Diffusers model, PRXPipeline: of a PRX give the folder, else give " in message


# Parts that are missing or damaged


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_pipeline_without_a_component_is_refused(part: str, pipeline: Path) -> None:
    shutil.rmtree(pipeline / part)
    name = {"transformer": "config.json", "scheduler": "scheduler_config.json"}[part]
    assert refusal(pipeline).endswith(f"expected {part}/{name}, found none: fetch the folder again")


@pytest.mark.parametrize(
    "part", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"]
)
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "expected JSON, found a damaged file ("),
        (b"{", "expected JSON, found a damaged file ("),
        (b"\xff\xfe\xfd", "expected JSON, found a damaged file ("),
        (b"[" * 100_000, "expected JSON, found a damaged file ("),
        (b"[]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
    ids=["empty", "open", "binary", "deep", "list", "null"],
)
def test_pipeline_with_a_configuration_that_is_no_json_is_refused(
    content: bytes, found: str, part: str, pipeline: Path
) -> None:
    (pipeline / part).parent.mkdir(exist_ok=True)
    (pipeline / part).write_bytes(content)
    assert f"{part}: {found}" in refusal(pipeline)


@pytest.mark.parametrize(
    ("left", "found"),
    [([], "config.json"), (["diffusion_pytorch_model.bin"], "config.json, diffusion_pytorch_model")],
)
def test_transformer_without_weights_is_refused(left: list[str], found: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", transformer_config(CONFIG))
    for name in left:
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert f"expected diffusion_pytorch_model.safetensors or its index, found {found}" in message
    assert message.endswith(": save the model with safe_serialization=True")


def test_transformer_of_several_variants_asks_for_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for variant in ("fp16", "bf16"):
        write_transformer(tmp_path, CONFIG, state, variant)
    assert refusal(tmp_path, exit_code=2).endswith("holds the variants bf16, fp16: give --key bf16")


def test_transformer_without_the_variant_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    write_transformer(tmp_path, CONFIG, state)
    expected = "expected weights of the variant fp16, found weights without a variant"
    assert refusal(tmp_path, "--key", "fp16", exit_code=2).endswith(expected)
    write_transformer(tmp_path, CONFIG, state, "bf16")
    assert refusal(tmp_path, "--weights", "ema", exit_code=2).endswith("variant ema, found the variants bf16")


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_transformer_with_damaged_weights_is_refused(damage: str, pipeline: Path) -> None:
    path = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"version https://git-lfs"}[damage])
    message = refusal(pipeline)
    expected = {"cut": "damaged, or not a safetensors file", "empty": "an empty file", "text": "a pointer of Git LFS"}
    assert expected[damage] in message


# Shards


INDEX = "diffusion_pytorch_model.safetensors.index.json"
FIRST, SECOND = (f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2))


def listed(folder: Path) -> dict[str, str]:
    names: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
    return names


def test_shards_without_one_are_refused(shards: Path) -> None:
    (shards / SECOND).unlink()
    assert refusal(shards).endswith(f"{INDEX}: expected its shards in the same folder, found no {SECOND}")


def test_shards_outside_of_the_folder_are_refused(shards: Path) -> None:
    edit(shards / INDEX, weight_map=listed(shards) | {"txt_in.weight": "../other.safetensors"})
    assert refusal(shards).endswith(f"{INDEX}: expected its shards in the same folder, found ../other.safetensors")


def test_index_that_names_another_shard_is_refused(shards: Path) -> None:
    name = next(name for name, file in listed(shards).items() if file == FIRST)
    edit(shards / INDEX, weight_map=listed(shards) | {name: SECOND})
    expected = f"{INDEX}: expected {name} in {SECOND}, found it in {FIRST}: fetch index and shards again"
    assert refusal(shards).endswith(expected)


def test_index_of_a_tensor_that_is_absent_is_refused(shards: Path) -> None:
    held = load_file(shards / FIRST)
    name = next(iter(held))
    save_file({other: tensor for other, tensor in held.items() if other != name}, shards / FIRST)
    assert f"{INDEX}: expected {name} in {FIRST}, found it in no shard" in refusal(shards)


def test_index_of_a_file_alone_that_lies_is_refused(shards: Path) -> None:
    edit(shards / INDEX, weight_map=listed(shards) | {"txt_in.bias": SECOND, "new": FIRST})
    assert re.search(r"expected (txt_in\.bias|new) in ", refusal(shards / INDEX))


@pytest.mark.parametrize("content", [b"{", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b'{"metadata": {}}'])
def test_index_that_is_none_is_refused(content: bytes, shards: Path) -> None:
    (shards / INDEX).write_bytes(content)
    found = "a damaged file" if content == b"{" else "JSON that is no index of shards"
    assert f"found {found}" in refusal(shards)


# Networks that are not covered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "configuration of the transformer: depth: expected 2, as in the tensors or all published"),
        ({"num_heads": 4}, "configuration of the transformer: num_heads: expected 2, as in the tensors"),
        ({"theta": 500.0}, "configuration of the transformer: theta: expected 10000.0, as in the tensors or all"),
        ({"guidance_embeds": True}, "guidance_embeds: expected no such field, found True: it is not supported"),
        ({"in_channels": "32"}, "in_channels: expected a whole number of at least 1, found '32'"),
        ({"patch_size": 0}, "patch_size: expected a whole number of at least 1, found 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_transformer_with_a_configuration_that_is_not_covered_is_refused(
    change: dict[str, Any], message: str, pipeline: Path
) -> None:
    edit(pipeline / "transformer" / "config.json", **change)
    assert message in refusal(pipeline)


def test_transformer_of_another_patch_than_its_tensors_is_refused(pipeline: Path) -> None:
    edit(pipeline / "transformer" / "config.json", patch_size=2)
    message = refusal(pipeline, exit_code=2)
    assert "channels and patch size: expected channels * patch² = 32, the values of a patch in " in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting: expected none, found True: it is not supported"),
        ({"_class_name": "DDIMScheduler"}, "_class_name: expected FlowMatchEulerDiscreteScheduler, found DDIMSchedul"),
        ({"shift": -3.0}, "shift: expected a float32 number above 0, found -3.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pipeline_with_another_scheduler_is_refused(change: dict[str, Any], message: str, pipeline: Path) -> None:
    write_json(pipeline / "scheduler" / "scheduler_config.json", SCHEDULER | change)
    assert f"configuration of the scheduler: {message}" in refusal(pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "AutoencoderTiny"},
            "_class_name: expected AutoencoderKL or AutoencoderDC, found Autoencoder",
        ),
        ({"latent_channels": 16}, "latent_channels: expected 32, as in the model, found 16"),
        ({"block_out_channels": 4}, "block_out_channels: expected a list with a number per level, found 4"),
        ({"block_out_channels": []}, "block_out_channels: expected a list with a number per level, found []"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pipeline_with_another_autoencoder_is_refused(change: dict[str, Any], message: str, pipeline: Path) -> None:
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 32, "block_out_channels": [1, 1]}
    write_json(pipeline / "vae" / "config.json", vae | change)
    assert f"configuration of the autoencoder: {message}" in refusal(pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default_sample_size": "512"}, "default_sample_size: expected a whole number of at least 1, found '512'"),
        ({"prompt_max_tokens": 0}, "prompt_max_tokens: expected a whole number of at least 1, found 0"),
        ({"noise_scale": [2]}, "noise_scale: expected a number, found [2]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pipeline_with_a_number_that_is_none_is_refused(change: dict[str, Any], message: str, pipeline: Path) -> None:
    edit(pipeline / "model_index.json", **change)
    assert refusal(pipeline).endswith(f"configuration of the pipeline: {message}")


@pytest.mark.parametrize("name", ["txt_in.weight", "blocks.0.attention.txt_kv_proj.weight"])
def test_transformer_without_text_projections_is_refused(name: str, tmp_path: Path, state: dict[str, Tensor]) -> None:
    kept = {other: tensor for other, tensor in state.items() if other != name}
    message = refusal(write_transformer(tmp_path, CONFIG, kept), "--size", "128x128")
    assert name in message
    save_file(kept, tmp_path / "alone.safetensors")
    assert name in refusal(tmp_path / "alone.safetensors", "--size", "128x128")


def test_training_file_of_sprint_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model = in_training(state) | {"sprint_fuse.weight": torch.ones(1)}
    torch.save({f"denoiser.{name}": tensor for name, tensor in model.items()}, tmp_path / "sprint.pt")
    message = refusal(tmp_path / "sprint.pt", "--size", "128x128")
    assert "sprint_fuse.weight: expected none, found one: the fusion of SPRINT, which is not supported" in message


# Facts and options


@pytest.mark.parametrize(
    ("size", "near"),
    [
        ("100x96", "96x96, 128x96"),
        ("100x200", "96x192, 96x224, 128x192, 128x224"),
        ("16x64", "32x64"),
        ("64x31", "64x32"),
    ],
)
def test_size_that_is_no_multiple_names_the_nearest(size: str, near: str, pipeline: Path) -> None:
    message = refusal(pipeline, "--size", size, exit_code=2)
    assert message.endswith(f"size {size}: expected multiples of 32 pixels, the side of a token: give --size {near}")


@pytest.mark.parametrize("size", ["512", "512x", "0x512", "axb", "512*512", "-32x32", "512x512x3", "1000000x32"])
def test_size_that_is_none_is_refused(size: str, pipeline: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(pipeline), "--size", size])
    assert result.exit_code == 2
    assert f"{size!r}: expected HEIGHTxWIDTH in pixels, for example 512x768" in result.stderr


def test_file_alone_without_a_size_asks_for_it(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "prx.safetensors")
    expected = "the size of the picture is unknown: give --size HEIGHTxWIDTH, such as 512x512"
    assert refusal(tmp_path / "prx.safetensors", exit_code=2).endswith(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prediction", "edm"], "prediction edm: expected flow or x0, as in all PRX models"),
        (["--heads", "4"], "heads: expected 2, as in the tensors, found 4: leave it out"),
        (["--route", "1-2"], "route 1-2: expected blocks 0 to 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_option_that_does_not_fit_is_refused(options: list[str], message: str, pipeline: Path) -> None:
    assert refusal(pipeline, *options, exit_code=2).endswith(message)


@pytest.mark.parametrize(
    ("facts", "exit_code", "message"),
    [
        ({"class_names": ["a"]}, 6, "class_names: expected none for a model that is conditioned on text, found some"),
        ({"space": "pixel"}, 6, "space: expected latent, as the side of a latent is 32 pixels, found pixel"),
        ({"pixels_per_latent": 0}, 6, "pixels_per_latent: expected at least 1, found 0"),
        ({"text_tokens": 0}, 2, "text_tokens: expected at least 1, found 0"),
        ({"size": [512]}, 6, "size."),
        (
            {"size": [-32, 32]},
            2,
            "size -32x32: expected multiples of 32 pixels, the side of a token: give --size 32",
        ),
        ({"noise_scale": 0.0}, 6, "prx: noise_scale: expected a float32 number above 0, found 0"),
        ({"time_shift": -1.0}, 6, "shift: expected a float32 number above 0, found -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fact_that_does_not_fit_is_refused(facts: dict[str, Any], exit_code: int, message: str, pipeline: Path) -> None:
    write_json(pipeline.with_name("prx.json"), facts)
    assert message in refusal(pipeline, exit_code=exit_code)


def test_channels_of_no_published_model_ask_for_the_side_of_a_latent(tmp_path: Path) -> None:
    save_file(state_of(replace(CONFIG, channels=5)), tmp_path / "prx.safetensors")
    assert "found none; the published models have 16 and 2" in refusal(
        tmp_path / "prx.safetensors", "--size", "64x64", exit_code=2
    )
    write_json(tmp_path / "prx.json", {"channels": 5, "patch": 1})
    message = refusal(tmp_path / "prx.safetensors", "--size", "64x64", exit_code=2)
    assert "expected samples of 3, 16, 32 channels, found 5: state pixels_per_latent" in message
    write_json(tmp_path / "prx.json", {"channels": 5})
    assert "found 5 and 0" in refusal(tmp_path / "prx.safetensors", "--size", "64x64", exit_code=2)


@pytest.mark.parametrize("option", [("--size", "64x64"), ("--text-tokens", "8")])
def test_option_of_models_with_text_is_refused_for_classes(option: tuple[str, str], tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.safetensors", tiny.state())
    message = refusal(path, *option, exit_code=2)
    assert message.endswith(f"expected no {option[0]} for a model of tread, whose tensors fix it")


def test_fact_of_models_with_text_is_refused_for_classes(tiny: Any, tmp_path: Path) -> None:
    torch.save(tiny.state(), tmp_path / "tiny.pt")
    facts = {"heads": 2, "prediction": "flow", "noise_scale": 2.0}
    write_json(tmp_path / "tiny.json", facts)
    assert refusal(tmp_path / "tiny.pt").endswith("noise_scale: expected none for a model of tread, found one")


def test_prediction_x0_is_refused_for_classes(tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.safetensors", tiny.state())
    assert refusal(path, "--prediction", "x0", exit_code=2).endswith(
        "prediction x0: expected flow or edm, as in all TREAD models"
    )


def test_pixels_of_a_resolution_are_sampled_at_any_multiple(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pixels", PIXEL, state_of(PIXEL))
    assert "expected multiples of 16 pixels" in refusal(folder, "--size", "40x32", exit_code=2)
