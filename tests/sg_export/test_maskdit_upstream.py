"""Checkpoints in MaskDiT's format through the adapter, compared with upstream's predictions.

Upstream is Anima-Lab/MaskDiT. `fixtures/make_maskdit_fixtures.py` ran its code and documents how.
The weights come from a seed: `fixtures/weights.py`.
"""

import argparse
import copy
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BOUND, ORDER_BOUND, Cases
from weights import relative_error

from sg_export.checkpoint import Overrides
from sg_export.loading import LoadedModel, load_model
from sg_export.models.dit import DiTConfig
from sg_export.models.maskdit import DECODER_WIDTH, MaskDiT
from sg_runtime.sampling import precondition

CASES = Cases("maskdit", "masked")


@functools.lru_cache(maxsize=1)
def loaded(name: str) -> LoadedModel:
    """Return the adapter's model of case `name`.

    The model comes from a file with everything that upstream's training script stores.
    """
    state = {f"model.{key}": value for key, value in CASES.state(name).items()}
    content = {"model": {}, "ema": state, "opt": {"state": {}, "param_groups": []}}
    content["args"] = argparse.Namespace(config="imagenet256-latent.yaml", cfg_scale=None, seeds=[0, 1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0050000.pt"
        torch.save(content, path)
        return load_model(path, overrides=Overrides(heads=CASES.by_name[name]["config"]["heads"]))


def model_of(name: str) -> Any:
    """Return a copy of the model of case `name`, whose weights a test may change."""
    return copy.deepcopy(loaded(name).model)


@pytest.mark.parametrize(("name", "run"), CASES.runs)
def test_prediction_with_upstream_weights_equals_upstream(name: str, run: str) -> None:
    assert CASES.error(loaded(name).model, name, run) <= BOUND


@pytest.mark.parametrize(("name", "run"), CASES.sparse_runs)
def test_prediction_with_sorted_keep_equals_unsorted(name: str, run: str) -> None:
    assert CASES.order_error(loaded(name).model, name, run) <= ORDER_BOUND


@pytest.mark.parametrize(("name", "run"), CASES.sparse_runs)
def test_level_keeps_as_many_tokens_as_upstream(name: str, run: str) -> None:
    sparsity = float(run.removeprefix("masked-"))
    assert loaded(name).level(sparsity).keep == CASES.arrays(name)[CASES.keep(run)].shape[1]


@pytest.mark.parametrize("facts", [*CASES.by_name.values(), CASES.facts["full_size"]], ids=lambda facts: facts["name"])
def test_state_dict_names_and_shapes_equal_upstream(facts: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = MaskDiT(DiTConfig(**facts["config"]))
    ours = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    if facts["name"] == "no-mask-token":
        del ours["mask_token"]
    assert ours == facts["shapes"]


def test_denoised_by_preconditioning_equals_upstreams_wrapper() -> None:
    arrays = CASES.arrays("patch1")
    x, classes = arrays["edm-x"], arrays["classes"]
    parts = [precondition("edm", sigma) for sigma in arrays["edm-sigma"].tolist()]
    c_in, c_skip, c_out = (
        torch.tensor([getattr(part, name) for part in parts])[:, None, None, None]
        for name in ("c_in", "c_skip", "c_out")
    )
    output = loaded("patch1").model(c_in * x, torch.tensor([part.t for part in parts]), {"class": classes})
    # Each factor differs from upstream's by one FP32 rounding (6e-8), far less than the network's
    # own rounding.
    assert relative_error(c_skip * x + c_out * output, arrays["edm-denoised"]) <= BOUND


def without_decoder_positions(model: Any) -> None:
    model.network.decoder_pos_embed.zero_()


def decoder_positions_columns_first(model: Any) -> None:
    config = model.network.config
    side = config.image_size // config.patch
    grid = model.network.decoder_pos_embed.reshape(1, side, side, DECODER_WIDTH)
    model.network.decoder_pos_embed.data = grid.transpose(1, 2).reshape(1, -1, DECODER_WIDTH)


def half_the_decoder_heads(model: Any) -> None:
    for block in model.network.decoder_blocks:
        block.attn.heads //= 2


def decoder_layer_scale_before_shift(model: Any) -> None:
    layer = model.network.decoder_layer.adaLN_modulation[1]
    width = model.network.config.width
    layer.weight.data = layer.weight.data.roll(width, dims=0)
    layer.bias.data = layer.bias.data.roll(width, dims=0)


def one_decoder_block_left_out(model: Any) -> None:
    model.network.decoder_blocks[7].forward = lambda tokens, branches: tokens


@pytest.mark.parametrize(
    "mistake",
    [
        without_decoder_positions,
        decoder_positions_columns_first,
        half_the_decoder_heads,
        decoder_layer_scale_before_shift,
        one_decoder_block_left_out,
    ],
    ids=lambda mistake: mistake.__name__,
)
@pytest.mark.parametrize("run", ["dense", "masked-0.5"])
def test_prediction_with_a_mistake_exceeds_bound(mistake: Callable[[Any], None], run: str) -> None:
    model = model_of("patch1")
    mistake(model)
    assert CASES.error(model, "patch1", run) > 10 * BOUND


@pytest.mark.parametrize("run", ["masked-0.3", "masked-0.9"])
def test_prediction_with_mask_token_ignored_exceeds_bound(run: str) -> None:
    model = model_of("patch1")
    model.network.mask_token.zero_()
    assert CASES.error(model, "patch1", run) > 10 * BOUND


def test_prediction_with_a_class_for_none_exceeds_bound() -> None:
    arrays, model = CASES.arrays("patch1"), loaded("patch1").model
    result = model(arrays["x"], arrays["t"], {"class": torch.full_like(arrays["classes"], 9)})
    assert relative_error(result, arrays["null"]) > 10 * BOUND


@pytest.mark.parametrize(
    "layer",
    [
        "blocks.1.norm1",
        "decoder_layer.norm_decoder",
        "decoder_blocks.0.norm1",
        "decoder_blocks.4.norm1",
        "final_layer.norm_final",
    ],
)
def test_prediction_with_larger_epsilon_exceeds_bound(layer: str) -> None:
    model = model_of("small-residual")
    model.network.get_submodule(layer).eps = 1e-5
    assert CASES.error(model, "small-residual", "masked-0.5") > 10 * BOUND


# Only the first of identical blocks is tested.
@pytest.mark.parametrize(
    "key", [key for key in CASES.by_name["patch1"]["shapes"] if not re.search(r"blocks\.[1-9]", key)]
)
def test_prediction_with_one_tensor_changed_exceeds_bound(key: str) -> None:
    model = model_of("patch1")
    model.network.state_dict()[key].mul_(1.01)
    # In particular, every tensor of the random weights affects the result.
    assert CASES.error(model, "patch1", "masked-0.5") > BOUND
