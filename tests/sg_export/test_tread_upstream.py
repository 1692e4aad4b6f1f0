"""Our DiT compared with upstream's predictions, for the same random weights and inputs.

Upstream is CompVis/tread. `fixtures/make_tread_fixtures.py` ran its code and documents how. The
weights come from a seed: `fixtures/weights.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BOUND, ORDER_BOUND, Cases
from torch import Tensor

from sg_export.models import dit
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import Route

CASES = Cases("tread", "routed")


def model_of(name: str) -> SparseModel:
    """Return our network of case `name` with upstream's weights; all keys and shapes must match."""
    case = CASES.by_name[name]
    with torch.device("meta"):
        network = DiT(DiTConfig(**case["config"]))
    # The weights are copies, so that a test may change them.
    network.load_state_dict({key: value.clone() for key, value in CASES.state(name).items()}, strict=True, assign=True)
    return SparseModel(network, Route(*case["route"])).eval()


@pytest.mark.parametrize(("name", "run"), CASES.runs)
def test_prediction_with_upstream_weights_equals_upstream(name: str, run: str) -> None:
    assert CASES.error(model_of(name), name, run) <= BOUND


@pytest.mark.parametrize(("name", "run"), CASES.sparse_runs)
def test_prediction_with_sorted_keep_equals_unsorted(name: str, run: str) -> None:
    assert CASES.order_error(model_of(name), name, run) <= ORDER_BOUND


@pytest.mark.parametrize("facts", [*CASES.by_name.values(), CASES.facts["full_size"]], ids=lambda facts: facts["name"])
def test_state_dict_names_and_shapes_equal_upstream(facts: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(**facts["config"]))
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == facts["shapes"]


def permute_rows(layer: Any, order: Callable[[Tensor], Tensor]) -> None:
    """Permute the outputs of a linear layer.

    `order` maps row numbers (R,) to row numbers (R,).
    """
    rows = order(torch.arange(layer.weight.shape[0]))
    layer.weight.data = layer.weight.data[rows]
    layer.bias.data = layer.bias.data[rows]


def swap_first_two(rows: Tensor, parts: int) -> Tensor:
    """Divide row numbers (R,) into `parts` equal parts and swap the first two."""
    first, second, *rest = rows.chunk(parts)
    return torch.cat([second, first, *rest])


def sines_first(model: Any) -> None:
    layer = model.network.t_embedder.mlp[0]
    layer.weight.data = layer.weight.data.roll(dit.FREQUENCIES, dims=1)


def keys_before_queries(model: Any) -> None:
    permute_rows(model.network.blocks[0].attn.qkv, lambda rows: swap_first_two(rows, 3))


def scale_before_shift(model: Any) -> None:
    permute_rows(model.network.blocks[0].adaLN_modulation[1], lambda rows: swap_first_two(rows, 6))


def scale_before_shift_in_head(model: Any) -> None:
    permute_rows(model.network.final_layer.adaLN_modulation[1], lambda rows: swap_first_two(rows, 2))


def head_channels_first(model: Any) -> None:
    config = model.network.config
    permute_rows(model.network.final_layer.linear, lambda rows: rows.reshape(config.channels, -1).T.reshape(-1))


def patch_columns_first(model: Any) -> None:
    layer = model.network.x_embedder.proj
    layer.weight.data = layer.weight.data.transpose(2, 3).contiguous()


def tokens_columns_first(model: Any) -> None:
    config = model.network.config
    side = config.image_size // config.patch
    grid = model.network.pos_embed.data.reshape(1, side, side, config.width)
    model.network.pos_embed.data = grid.transpose(1, 2).reshape(1, -1, config.width)


@pytest.mark.parametrize(
    "mistake",
    [
        sines_first,
        keys_before_queries,
        scale_before_shift,
        scale_before_shift_in_head,
        head_channels_first,
        patch_columns_first,
        tokens_columns_first,
    ],
    ids=lambda mistake: mistake.__name__,
)
@pytest.mark.parametrize("run", ["dense", "routed-0.5"])
def test_prediction_with_a_mistake_exceeds_bound(mistake: Callable[[Any], None], run: str) -> None:
    model = model_of("one-routed-block")
    mistake(model)
    assert CASES.error(model, "one-routed-block", run) > 10 * BOUND


def test_prediction_with_erf_gelu_exceeds_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = functools.partial(torch.nn.functional.gelu, approximate="none")
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: exact(x))
    assert CASES.error(model_of("one-routed-block"), "one-routed-block", "dense") > 10 * BOUND


@pytest.mark.parametrize("layer", ["blocks.0.norm1", "blocks.1.norm2", "blocks.2.norm1", "final_layer.norm_final"])
def test_prediction_with_larger_epsilon_exceeds_bound(layer: str) -> None:
    model: Any = model_of("small-residual")
    model.network.get_submodule(layer).eps = 1e-5
    assert CASES.error(model, "small-residual", "routed-0.5") > 10 * BOUND


@pytest.mark.parametrize("key", CASES.by_name["one-routed-block"]["shapes"])
def test_prediction_with_one_tensor_changed_exceeds_bound(key: str) -> None:
    model: Any = model_of("one-routed-block")
    model.network.state_dict()[key].mul_(1.01)
    # In particular, every tensor of the random weights affects the result.
    assert CASES.error(model, "one-routed-block", "routed-0.5") > BOUND
