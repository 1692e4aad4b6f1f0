"""PRX checkpoints in the layouts of diffusers and of the training code, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from prx_folders import CONFIG, PIXEL, in_training, state_of
from torch import Tensor

from sg_export.adapters import prx
from sg_export.checkpoint import Checkpoint, CheckpointFacts, read_checkpoint
from sg_export.models.prx import PRX, PRXConfig
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import Route, Source


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
