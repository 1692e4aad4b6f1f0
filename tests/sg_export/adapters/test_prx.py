"""PRX checkpoints in the layouts of diffusers and of the training code, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import HERE
from torch import Tensor
from weights import random_state

from sg_export.adapters import prx
from sg_export.checkpoint import Checkpoint, CheckpointFacts, read_checkpoint
from sg_export.models.prx import PRX, PRXConfig
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import Route, Sampling, Shifted, Source
from sg_runtime.sampling import run_times

CONFIG = PRXConfig((4, 6), 1, 32, 16, 2, 2, 20, 5, 3)
PIXEL = PRXConfig((32, 16), 16, 3, 16, 1, 2, 20, 5, 3, bottleneck=4, resolution=True)


def state_of(config: PRXConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights by diffusers' names."""
    with torch.device("meta"):
        network = PRX(config)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    return {name: torch.from_numpy(value) for name, value in random_state(shapes, seed, {}).items()}


def in_training(state: dict[str, Tensor], norm: str = "scale") -> dict[str, Tensor]:
    """Return weights of a denoiser by the names of the training code.

    norm: last part of the names of its norms, which depends on the version.
    """
    renamed = {}
    for name, tensor in state.items():
        for diffusers, photoroom in (
            (r"attention\.(img_qkv_proj|txt_kv_proj)", r"\1"),
            (r"attention\.to_out\.0", "attn_out"),
            (r"attention\.norm_q\.weight", f"qk_norm.query_norm.{norm}"),
            (r"attention\.norm_k\.weight", f"qk_norm.key_norm.{norm}"),
            (r"attention\.norm_added_k\.weight", f"k_norm.{norm}"),
        ):
            name = re.sub(diffusers, photoroom, name)
        renamed[name] = tensor
    return renamed


def checkpoint(tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(Source("prx.safetensors", "", "bare", None), tensors, CheckpointFacts(), "")


def assert_holds(network: PRX, state: dict[str, Tensor]) -> None:
    found = network.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in state.items())


@pytest.mark.parametrize("config", [CONFIG, PIXEL], ids=["DC-AE", "pixel"])
def test_load_network_infers_the_shape(config: PRXConfig) -> None:
    state = state_of(config)
    network = prx.load_network(checkpoint(state), config.image_size, text_tokens=3)
    assert network.config == config
    assert_holds(network, state)
    assert not network.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_network_of_half_precision_is_in_fp32(dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state_of(CONFIG).items()}
    assert_holds(prx.load_network(checkpoint(state), (4, 6)), state)


@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_load_network_takes_the_names_of_the_training_code(norm: str) -> None:
    state = state_of(CONFIG)
    assert_holds(prx.load_network(checkpoint(in_training(state, norm)), (4, 6)), state)


@pytest.mark.parametrize("averaged", [True, False])
def test_load_network_of_a_composer_file_takes_averaged_weights_if_there_are_any(
    averaged: bool, tmp_path: Path
) -> None:
    plain, ema = state_of(PIXEL, 0), state_of(PIXEL, 1)
    resolution = {name: tensor for name, tensor in plain.items() if name.startswith("resolution_embedder.")}

    def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in in_training(state).items() if name not in resolution}

    model = {**under("denoiser.", plain), **resolution, "text_tower.embed.weight": torch.ones(2, 2)}
    model |= under("ema_denoiser.model.", ema) if averaged else {}
    moments = {"denoiser.txt_in.weight": {"exp_avg": torch.ones(2)}}
    content: dict[str, Any] = {"state": {"model": model, "optimizers": {"AdamW": {"state": moments}}}, "rng": []}
    torch.save(content, tmp_path / "ep0-ba100-rank0.pt")
    network = prx.load_network(read_checkpoint(tmp_path / "ep0-ba100-rank0.pt"), (32, 16))
    assert_holds(network, {**(ema if averaged else plain), **resolution})


def test_load_network_of_a_patch_that_no_published_model_has_needs_the_sample() -> None:
    state = state_of(PRXConfig((4, 6), 2, 5, 16, 1, 2, 20, 5, 3))
    with pytest.raises(
        UsageError, match=r"channels \* patch² = 20.*found none; the published models have 16 and 2, 32"
    ):
        prx.load_network(checkpoint(state), (4, 6))
    with pytest.raises(UsageError, match=r"channels \* patch² = 20.*found 5 and 1"):
        prx.load_network(checkpoint(state), (4, 6), sample=(5, 1))
    assert prx.load_network(checkpoint(state), (4, 6), sample=(5, 2)).config.patch == 2


@pytest.mark.parametrize("size", [(16, 24), (0, 16), (8, 8)])
def test_load_network_refuses_a_size_that_is_no_multiple_of_the_patch(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"image size {size[0]}×{size[1]}: expected multiples of the patch size 16"):
        prx.load_network(checkpoint(state_of(PIXEL)), size)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("sprint_fuse.weight", "the fusion of SPRINT"),
        ("sprint_mask_token", "the mask token of SPRINT"),
        ("resolution_embedder.h_embedder.in_layer.weight", "the resolution as text tokens"),
    ],
)
def test_load_network_refuses_a_variant_by_the_tensor_that_shows_it(name: str, meaning: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(name)}: expected none, found one: {meaning}.*not supported"
    ):
        prx.load_network(checkpoint({**state_of(CONFIG), name: torch.ones(1)}), (4, 6))


def test_load_network_refuses_an_unknown_tensor() -> None:
    with pytest.raises(CheckpointError, match=r"found unknown blocks\.0\.lora\.weight \(1\)"):
        prx.load_network(checkpoint({**state_of(CONFIG), "blocks.0.lora.weight": torch.ones(1)}), (4, 6))


@pytest.mark.parametrize("name", list(state_of(PRXConfig((4, 6), 1, 32, 16, 1, 2, 20, 5, 3))))
def test_load_network_reports_a_missing_tensor(name: str) -> None:
    state = state_of(PRXConfig((4, 6), 1, 32, 16, 1, 2, 20, 5, 3))
    del state[name]
    with pytest.raises(CheckpointError, match=re.escape(name)):
        prx.load_network(checkpoint(state), (4, 6))


@pytest.mark.parametrize("size", [3, 6, 16 * 2])
def test_load_network_refuses_a_head_that_does_not_divide_the_width(size: int) -> None:
    state = state_of(CONFIG) | {"blocks.0.attention.norm_q.weight": torch.ones(size)}
    with pytest.raises(CheckpointError, match=f"norm_q.weight: expected a divisor of the width 16.*found {size}"):
        prx.load_network(checkpoint(state), (4, 6))


@pytest.mark.parametrize(
    ("tokens", "sparsity", "kept"),
    [(256, 0.5, 128), (5, 0.5, 3), (7, 0.5, 3), (9, 0.5, 5), (4, 0.01, 3), (4, 0.99, 1), (1, 0.5, 1), (8, 0.0, 8)],
)
def test_kept_count_rounds_half_to_even(tokens: int, sparsity: float, kept: int) -> None:
    """Of 5, 7 and 9 tokens, 2.5, 3.5 and 4.5 would be dropped: 2, 4 and 4 are."""
    assert prx.kept_count(tokens, sparsity) == kept


def test_usual_route_is_that_of_the_public_recipe() -> None:
    assert prx.usual_route(16) == Route(2, 12)


STATED: dict[str, Any] = {
    "_class_name": "PRXTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "axes_dim": [4, 4],
    "bottleneck_size": 4,
    "context_in_dim": 5,
    "depth": 1,
    "hidden_size": 16,
    "in_channels": 3,
    "mlp_ratio": 1.3,
    "num_heads": 2,
    "patch_size": 16,
    "resolution_embeds": True,
    "theta": 10000,
    "time_factor": 1000.0,
    "time_max_period": 10000,
}
"""config.json of `PIXEL`, as diffusers 0.42.1 writes it. int(1.3 * 16) is 20."""


def test_check_config_accepts_the_config_of_the_network() -> None:
    prx.check_config(STATED, PIXEL, "config.json")


def test_check_config_takes_upstreams_default_of_axes() -> None:
    config = PRXConfig((4, 6), 1, 32, 128, 2, 2, 20, 5, 3)
    prx.check_config({"axes_dim": None}, config, "config.json")
    with pytest.raises(CheckpointError, match=r"axes_dim: expected \[4, 4\].*found \[32, 32\]"):
        prx.check_config({"axes_dim": None}, PIXEL, "config.json")


@pytest.mark.parametrize("name", [name for name in STATED if name[0] != "_"])
def test_check_config_refuses_another_value_by_its_field(name: str) -> None:
    other = [2, 6] if name == "axes_dim" else not STATED[name] if name == "resolution_embeds" else STATED[name] + 1
    with pytest.raises(CheckpointError, match=rf"^config\.json: {name}: expected .*, found {re.escape(str(other))}$"):
        prx.check_config({**STATED, name: other}, PIXEL, "config.json")


def test_check_config_refuses_an_unknown_field() -> None:
    with pytest.raises(CheckpointError, match="guidance_embeds: expected no such field, found True"):
        prx.check_config({**STATED, "guidance_embeds": True}, PIXEL, "config.json")


FACTS = json.loads((HERE / "prx_upstream.json").read_bytes())


@pytest.mark.parametrize(
    "case", FACTS["schedules"], ids=lambda case: f"{case['shift']:g}-{case['num_train_timesteps']}-{case['steps']}"
)
def test_read_scheduler_gives_the_times_of_diffusers(case: dict[str, Any]) -> None:
    """Diffusers rounds its times to float32."""
    stated = {**FACTS["scheduler"], "shift": case["shift"], "num_train_timesteps": case["num_train_timesteps"]}
    times = run_times(case["steps"], prx.read_scheduler(stated, "scheduler_config.json"))
    assert times == pytest.approx(case["sigmas"], rel=2**-22)


def test_read_scheduler_of_missing_fields_takes_upstreams_defaults() -> None:
    stated = {"_class_name": FACTS["scheduler"]["_class_name"]}
    assert prx.read_scheduler(stated, "") == prx.read_scheduler(FACTS["scheduler"], "") == Shifted(1.0, 0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name: expected FlowMatchEulerDiscreteScheduler, found DDIMSchedule"),
        ({"_class_name": None}, "_class_name: expected FlowMatchEulerDiscreteScheduler, found None"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting: expected none, found True: it is not supported"),
        ({"shift_terminal": 0.02}, "shift_terminal: expected none, found 0.02: it is not supported"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas: expected none, found True: it is not supported"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas: expected none, found True: it is not supported"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas: expected none, found True: it is not supported"),
        ({"invert_sigmas": True}, "invert_sigmas: expected none, found True: it is not supported"),
        ({"stochastic_sampling": True}, "stochastic_sampling: expected none, found True: it is not supported"),
        ({"solver": "heun"}, "solver: expected no such field, found heun: it is not supported"),
        ({"shift": "3"}, "shift: expected a number, found '3'"),
        ({"shift": True}, "shift: expected a number, found True"),
        ({"shift": 0.0}, "shift: expected a float32 number above 0, found 0.0"),
        ({"shift": -999.0}, "shift: expected a float32 number above 0, found -999.0"),
        ({"shift": float("nan")}, "shift: expected a float32 number above 0, found nan"),
        ({"num_train_timesteps": 1}, "num_train_timesteps: expected a number of at least 2, found 1"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps: expected a number of at least 2, found 1000.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_read_scheduler_refuses_what_is_not_supported_by_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        prx.read_scheduler({**FACTS["scheduler"], **change}, "scheduler_config.json")
    assert str(caught.value).startswith(f"scheduler_config.json: {message}")


def test_default_sampling_is_that_of_both_codes() -> None:
    times = Shifted(3.0, None)
    assert prx.default_sampling("flow", times, 1.0) == Sampling("euler", 28, times, 1.0, 0.0)
    assert prx.default_sampling("x0", times, 2.0) == Sampling("euler", 28, times, 2.0, 0.05)
