"""Our DiT beside upstream's: same random weights, same inputs, and the predictions that CompVis/tread's own code made.

`fixtures/make_tread_fixtures.py` ran upstream's code and says how. The weights come from a seed: `fixtures/weights.py`.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sg_export.models import dit
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import Route

FIXTURES = Path(__file__).parent / "fixtures"
FACTS = json.loads((FIXTURES / "tread_upstream.json").read_bytes())
CASES = {case["name"]: case for case in FACTS["cases"]}
RUNS = [(name, run) for name, case in CASES.items() for run in case["rounding"]]
ROUTED = [(name, run) for name, run in RUNS if run.startswith("routed-")]

# Upstream's FP32 lies up to 1.3e-6 from its own FP64 (`rounding` in the JSON). Ours may lie as far the other way, and
# another CPU adds in another order: four times that sum. The mistakes below lie more than ten bounds away.
BOUND = 1e-5


def load_weights_module() -> ModuleType:
    """`fixtures/weights.py`, by path: `tests` is no package, and some distributions install one of that name."""
    spec = importlib.util.spec_from_file_location("tread_fixture_weights", FIXTURES / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


weights = load_weights_module()


@functools.lru_cache(maxsize=1)
def state_of(name: str) -> dict[str, Tensor]:
    """The random weights that upstream's network of case `name` had, under upstream's names."""
    case = CASES[name]
    values = weights.random_state(case["shapes"], case["seed"], case["gains"])
    return {key: torch.from_numpy(value) for key, value in values.items()}


def model_of(name: str) -> SparseModel:
    """Our network of case `name` with upstream's weights, every key and shape accounted for."""
    case = CASES[name]
    with torch.device("meta"):
        network = DiT(DiTConfig(**case["config"]))
    # Copies, so that a test may change its model's weights.
    network.load_state_dict({key: value.clone() for key, value in state_of(name).items()}, strict=True, assign=True)
    return SparseModel(network, Route(*case["route"])).eval()


def arrays_of(name: str) -> dict[str, Tensor]:
    """Inputs and upstream's predictions of case `name`."""
    with np.load(FIXTURES / "tread_upstream.npz") as stored:
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): torch.from_numpy(stored[key]) for key in stored.files if key.startswith(prefix)
        }


def predict(model: SparseModel, arrays: dict[str, Tensor], run: str, num_classes: int) -> Tensor:
    """Our prediction for one run: `dense`, `null` (dense, no class) or `routed-<sparsity>` with upstream's indices."""
    classes = torch.full_like(arrays["classes"], num_classes) if run == "null" else arrays["classes"]
    keep = arrays[run.replace("routed", "keep")] if run.startswith("routed-") else None
    with torch.inference_mode():
        prediction: Tensor = model(arrays["x"], arrays["t"], classes, keep)
    return prediction


def error(model: SparseModel, name: str, run: str) -> float:
    """Relative error of our prediction against upstream's."""
    arrays = arrays_of(name)
    prediction = predict(model, arrays, run, CASES[name]["config"]["num_classes"])
    assert prediction.shape == arrays[run].shape
    measured: float = weights.relative_error(prediction.numpy(), arrays[run].numpy())
    return measured


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_prediction_with_upstream_weights_equals_upstream(name: str, run: str) -> None:
    assert error(model_of(name), name, run) <= BOUND


@pytest.mark.parametrize(("name", "run"), ROUTED)
def test_prediction_with_sorted_keep_equals_unsorted(name: str, run: str) -> None:
    arrays = arrays_of(name)
    keep = arrays[run.replace("routed", "keep")]
    ascending = keep.sort(dim=1).values
    assert not torch.equal(ascending, keep)
    model = model_of(name)
    unsorted = predict(model, arrays, run, CASES[name]["config"]["num_classes"])
    arrays[run.replace("routed", "keep")] = ascending
    result = predict(model, arrays, run, CASES[name]["config"]["num_classes"])
    # The order of the keys is the order of sums in attention. That alone differs: 7e-7 at most where this was written.
    assert weights.relative_error(result.numpy(), unsorted.numpy()) <= 3e-6


@pytest.mark.parametrize("facts", [*CASES.values(), FACTS["full_size"]], ids=lambda facts: facts["name"])
def test_state_dict_names_and_shapes_equal_upstream(facts: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(**facts["config"]))
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == facts["shapes"]


def permute_rows(layer: Any, order: Callable[[Tensor], Tensor]) -> None:
    """Put the outputs of a linear layer in another order; `order` maps row numbers (R,) to row numbers (R,)."""
    rows = order(torch.arange(layer.weight.shape[0]))
    layer.weight.data = layer.weight.data[rows]
    layer.bias.data = layer.bias.data[rows]


def swap_first_two(rows: Tensor, parts: int) -> Tensor:
    """Row numbers (R,) in `parts` equal parts, the first two in each other's place."""
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
    assert error(model, "one-routed-block", run) > 10 * BOUND


def test_prediction_with_erf_gelu_exceeds_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = functools.partial(torch.nn.functional.gelu, approximate="none")
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: exact(x))
    assert error(model_of("one-routed-block"), "one-routed-block", "dense") > 10 * BOUND


@pytest.mark.parametrize("layer", ["blocks.0.norm1", "blocks.1.norm2", "blocks.2.norm1", "final_layer.norm_final"])
def test_prediction_with_larger_epsilon_exceeds_bound(layer: str) -> None:
    model: Any = model_of("small-residual")
    model.network.get_submodule(layer).eps = 1e-5
    assert error(model, "small-residual", "routed-0.5") > 10 * BOUND


@pytest.mark.parametrize("key", CASES["one-routed-block"]["shapes"])
def test_prediction_with_one_tensor_changed_exceeds_bound(key: str) -> None:
    model: Any = model_of("one-routed-block")
    model.network.state_dict()[key].mul_(1.01)
    # Above all this says that no tensor of the recipe is out of the result's reach.
    assert error(model, "one-routed-block", "routed-0.5") > BOUND
