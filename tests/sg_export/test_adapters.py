"""Detection of a checkpoint's family, and the adapters' results from its tensors and facts."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sg_export.adapters import ADAPTERS, find_adapter, maskdit, tread
from sg_export.checkpoint import Checkpoint, CheckpointFacts, Overrides
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.maskdit import DECODER_WIDTH, MaskDiT
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import Route, Source

SOURCE = Source("model.pt", "0" * 64, "bare", None)


def checkpoint(tensors: dict[str, Any], prefix: str = "", **facts: Any) -> Checkpoint:
    return Checkpoint(SOURCE, tensors, CheckpointFacts(**facts), prefix)


def test_find_adapter_by_keys_finds_tread(tiny: Any) -> None:
    assert find_adapter(checkpoint(tiny.state())) is tread


def test_find_adapter_by_keys_finds_maskdit_before_tread(tiny_masked: Any) -> None:
    tensors = tiny_masked.state()
    assert set(tread.KEYS) < set(tensors)
    assert find_adapter(checkpoint(tensors)) is maskdit


@pytest.mark.parametrize("family", ADAPTERS)
def test_find_adapter_by_name_finds_it(family: str) -> None:
    assert find_adapter(checkpoint({}, family=family)) is ADAPTERS[family]


def test_find_adapter_with_unknown_name_lists_the_known() -> None:
    with pytest.raises(CheckpointError, match=r"^model.pt: family 'unet': expected one of maskdit, tread, prx$"):
        find_adapter(checkpoint({}, family="unet"))


def test_find_adapter_of_other_family_names_the_keys_that_decided(tiny: Any) -> None:
    tensors = tiny.state()
    del tensors["pos_embed"]
    tensors["a.conv_in.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        find_adapter(checkpoint(tensors))
    assert str(caught.value) == (
        "model.pt: expected a checkpoint of a supported family (maskdit needs decoder_layer.linear.weight; tread needs "
        "pos_embed; prx needs txt_in.weight, blocks.0.modulation.lin.weight), found a.conv_in.weight, "
        "blocks.0.adaLN_modulation.1.bias, blocks.0.adaLN_modulation.1.weight, blocks.0.attn.proj.bias, "
        "blocks.0.attn.proj.weight, blocks.0.attn.qkv.bias"
    )


def test_find_adapter_of_a_network_among_others_names_its_key(tiny: Any) -> None:
    tensors = {**{f"net.{name}": tensor for name, tensor in tiny.state().items()}, "loss.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"; there is one under net: give `weights` net$"):
        find_adapter(checkpoint(tensors))


@pytest.mark.parametrize("family", ADAPTERS)
def test_adapters_have_the_parts_that_callers_use(family: str) -> None:
    adapter = ADAPTERS[family]
    assert family == adapter.FAMILY
    assert adapter.KEYS
    assert all(callable(getattr(adapter, name)) for name in ("build", "kept_count", "usual_route"))


@given(tokens=st.integers(1, 4096), sparsity=st.floats(0, 1, exclude_max=True))
def test_kept_of_tread_is_upstreams_rounding(tokens: int, sparsity: float) -> None:
    kept = tread.kept_count(tokens, sparsity)
    # `routing_module.py`, `Router.get_mask`: num_keep = N - int(N * mask_ratio).
    assert kept == tokens - int(tokens * sparsity)
    assert 1 <= kept <= tokens
    assert tokens * (1 - sparsity) - 1e-9 <= kept < tokens * (1 - sparsity) + 1 + 1e-9  # rounding of the product


@given(tokens=st.integers(1, 4096), sparsity=st.floats(0, 1, exclude_max=True))
def test_kept_of_maskdit_is_upstreams_rounding(tokens: int, sparsity: float) -> None:
    kept = maskdit.kept_count(tokens, sparsity)
    # `models/maskdit.py`, `get_mask`: len_keep = int(length * (1 - mask_ratio)).
    assert kept == int(tokens * (1 - sparsity))
    assert 0 <= kept <= tokens
    assert kept <= tread.kept_count(tokens, sparsity) <= kept + 1


@pytest.mark.parametrize("family", ADAPTERS)
@given(tokens=st.integers(1, 4096), rates=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_kept_of_higher_sparsity_is_not_more(family: str, tokens: int, rates: tuple[float, float]) -> None:
    assert ADAPTERS[family].kept_count(tokens, max(rates)) <= ADAPTERS[family].kept_count(tokens, min(rates))


@pytest.mark.parametrize(
    ("tokens", "sparsity", "by_tread", "by_maskdit"),
    # In floating point, 100 * 0.29 is 28.999999999999996, so tread leaves out 28 tokens, and
    # 10 * (1 - 0.9) is 0.9999999999999998, so MaskDiT keeps none.
    [
        (100, 0.29, 72, 71),
        (256, 0.3, 180, 179),
        (256, 0.5, 128, 128),
        (256, 0.9, 26, 25),
        (256, 0.0, 256, 256),
        (64, 0.99, 1, 0),
        (10, 0.9, 1, 0),
    ],
)
def test_kept_of_known_rates_is_known(tokens: int, sparsity: float, by_tread: int, by_maskdit: int) -> None:
    assert tread.kept_count(tokens, sparsity) == by_tread
    assert maskdit.kept_count(tokens, sparsity) == by_maskdit


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch"),
    [(*size, patch) for size, patch in itertools.product([(384, 12, 6), (768, 12, 12), (1024, 24, 16)], [1, 2, 4, 8])]
    + [(1152, 28, 16, 2)],
)
def test_infer_config_of_upstreams_sizes_gives_their_shape(width: int, depth: int, heads: int, patch: int) -> None:
    config = DiTConfig(32, patch, 4, width, depth, heads, 4 * width, 1000)
    with torch.device("meta"):
        tensors = DiT(config).state_dict()
    assert tread.infer_config(checkpoint(tensors), None) == config


def test_infer_config_of_unknown_width_asks_for_heads(tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"width 32 is not one of upstream's \(384, 768, 1024, 1152\): give `heads`"):
        tread.infer_config(checkpoint(tiny.state()), None)


@pytest.mark.parametrize("heads", [5, 64, 0, -2])
def test_infer_config_with_heads_that_do_not_divide_raises(heads: int, tiny: Any) -> None:
    with pytest.raises(UsageError, match=f"heads: expected a divisor of the width 32, found {heads}$"):
        tread.infer_config(checkpoint(tiny.state()), heads)


def test_usual_route_of_published_depths_is_theirs() -> None:
    assert tread.usual_route(12) == Route(2, 8)
    assert tread.usual_route(28) == Route(2, 24)


@given(depth=st.integers(1, 64))
def test_usual_route_of_any_depth_lies_in_the_network(depth: int) -> None:
    assert tread.usual_route(depth).end < depth


def test_build_states_the_facts(tiny: Any) -> None:
    read = checkpoint(tiny.state(), heads=2, route="1-1", prediction="flow", class_names=tuple("abcde"))
    model, facts = tread.build(read, Overrides())
    shape = (*facts.latent[1::-1], facts.patch, facts.tokens, facts.width, facts.depth, facts.heads)
    assert shape == (8, 2, 2, 16, 32, 3, 2)
    assert (facts.family, facts.prediction, facts.space, facts.labels.count) == ("tread", "flow", "latent", 5)
    assert facts.held["modulations"][0] == 6 * 32 * 3 + 2 * 32
    assert facts.parameters == sum(tensor.numel() for tensor in read.tensors.values())
    assert facts.route == model.route == Route(1, 1)
    assert facts.labels.names == ("a", "b", "c", "d", "e")
    assert not model.training


def test_build_overrides_stand_before_the_checkpoints_facts(tiny: Any) -> None:
    read = checkpoint(tiny.state(), heads=2, route="1-1", prediction="flow")
    model, facts = tread.build(read, Overrides(Route(0, 2), 4, "edm"))
    assert (facts.route, facts.heads, facts.prediction) == (Route(0, 2), 4, "edm")
    assert model.route == Route(0, 2)


@pytest.mark.parametrize(("channels", "space"), [(1, "pixel"), (3, "pixel"), (4, "latent")])
def test_build_space_without_a_fact_follows_the_channels(channels: int, space: str) -> None:
    tensors = DiT(DiTConfig(4, 2, channels, 8, 1, 2, 16, 3)).state_dict()
    assert tread.build(checkpoint(tensors, heads=2, prediction="flow"), Overrides())[1].space == space
    stated = checkpoint(tensors, heads=2, prediction="flow", space="latent")
    assert tread.build(stated, Overrides())[1].space == "latent"


def test_build_of_unknown_route_leaves_it_open(tiny: Any) -> None:
    assert tread.build(checkpoint(tiny.state(), heads=2, prediction="flow"), Overrides())[1].route is None


@pytest.mark.parametrize("end", [3, 99])
def test_build_with_route_beyond_the_network_raises(end: int, tiny: Any) -> None:
    with pytest.raises(UsageError, match=f"model.pt: route 1-{end}: expected blocks 0 to 2"):
        tread.build(checkpoint(tiny.state(), heads=2, prediction="flow"), Overrides(Route(1, end)))


def test_build_of_unknown_prediction_names_the_option(tiny: Any) -> None:
    message = r"unknown: give `prediction` flow \(velocity noise - data, noise at t = 1\) or `prediction` edm; SiT's"
    with pytest.raises(UsageError, match=message):
        tread.build(checkpoint(tiny.state(), "module.", heads=2), Overrides())


@pytest.mark.parametrize(
    ("stated", "given", "prediction", "warned"),
    [
        (None, None, "edm", False),
        ("edm", None, "edm", False),
        ("flow", None, "flow", True),
        (None, "flow", "flow", True),
    ],
)
def test_build_of_the_edm_wrappers_names_is_edm_unless_stated(
    stated: Any, given: Any, prediction: str, warned: bool, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    read = checkpoint(tiny.state(), "module.model.", heads=2, prediction=stated)
    assert tread.build(read, Overrides(prediction=given))[1].prediction == prediction
    assert ("model.pt: its names have the prefix of EDM's wrapper, module.model., which" in caplog.text) == warned


def test_build_of_half_precision_is_its_values_in_fp32(tiny: Any, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        tensors = {name: tensor.to(dtype) for name, tensor in tiny.state().items()}
        model, _ = tread.build(checkpoint(tensors, heads=2, prediction="flow"), Overrides())
        loaded = model.network.state_dict()  # type: ignore[attr-defined]
        assert all(loaded[name].dtype == torch.float32 for name in tensors)
        assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


def empty(config: DiTConfig) -> dict[str, torch.Tensor]:
    """Return the tensors of a MaskDiT of any size without memory: they share a single zero."""
    with torch.device("meta"):
        return {
            name: torch.zeros((), device="cpu").expand(tensor.shape)
            for name, tensor in MaskDiT(config).state_dict().items()
        }


def test_build_of_maskdit_states_the_facts(tiny_masked: Any) -> None:
    read = checkpoint(tiny_masked.state(), "model.", class_names=tuple("abcde"))
    model, facts = maskdit.build(read, Overrides(heads=2))
    shape = (*facts.latent[1::-1], facts.patch, facts.tokens, facts.width, facts.depth, facts.heads)
    assert shape == (8, 2, 2, 16, 32, 3, 2)
    assert (facts.family, facts.prediction, facts.space, facts.labels.count) == ("maskdit", "edm", "latent", 5)
    # Three blocks have six vectors each, and the layer between has two. Eight blocks have six each,
    # and the final layer has two.
    assert facts.held["modulations"][0] == (6 * 3 + 2) * 32 + (6 * 8 + 2) * 512
    assert facts.parameters == sum(tensor.numel() for tensor in read.tensors.values())
    assert facts.labels.names == ("a", "b", "c", "d", "e")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_build_of_maskdit_routes_the_encoder_and_the_layer_to_the_decoder(tiny_masked: Any) -> None:
    model, facts = maskdit.build(checkpoint(tiny_masked.state(), heads=2), Overrides())
    assert facts.route == maskdit.usual_route(3) == Route(0, 2)
    assert model.route == Route(0, 3)


@pytest.mark.parametrize("facts", [{}, {"route": "0-2"}, {"prediction": "edm"}])
@pytest.mark.parametrize("overrides", [Overrides(), Overrides(Route(0, 2), None, "edm")])
def test_build_of_maskdit_with_its_own_facts_takes_them(
    overrides: Overrides, facts: dict[str, Any], tiny_masked: Any
) -> None:
    stated = maskdit.build(checkpoint(empty(tiny_masked.config), heads=2, **facts), overrides)[1]
    assert (stated.route, stated.prediction) == (Route(0, 2), "edm")


@pytest.mark.parametrize("route", [Route(0, 3), Route(1, 2), Route(0, 1), Route(1, 1)])
def test_build_of_maskdit_with_another_route_raises(route: Route, tiny_masked: Any) -> None:
    message = f"model.pt: route {route}: expected 0-2, the entire encoder: leave out the route"
    with pytest.raises(UsageError) as caught:
        maskdit.build(checkpoint(empty(tiny_masked.config), heads=2), Overrides(route))
    assert str(caught.value) == message


def test_build_of_maskdit_with_another_prediction_raises(tiny_masked: Any) -> None:
    with pytest.raises(
        UsageError, match="prediction flow: expected edm, as in all MaskDiT models: leave out the prediction"
    ):
        maskdit.build(checkpoint(empty(tiny_masked.config), heads=2), Overrides(prediction="flow"))


def test_build_of_maskdit_without_mask_token_has_zeros(tiny_masked: Any) -> None:
    tensors = tiny_masked.state()
    del tensors["mask_token"]
    model, _ = maskdit.build(checkpoint(tensors, heads=2), Overrides())
    assert model.network.mask is not None
    assert torch.equal(model.network.mask, torch.zeros(1, 1, DECODER_WIDTH))


@pytest.mark.parametrize(("channels", "space"), [(1, "pixel"), (3, "pixel"), (4, "latent")])
def test_build_of_maskdit_space_without_a_fact_follows_the_channels(channels: int, space: str) -> None:
    tensors = empty(DiTConfig(4, 2, channels, 32, 1, 2, 32, 3))
    assert maskdit.build(checkpoint(tensors, heads=2), Overrides())[1].space == space


@pytest.mark.parametrize(
    ("width", "depth", "heads"), [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16), (1280, 32, 16)]
)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_build_of_maskdits_sizes_gives_their_shape(patch: int, width: int, depth: int, heads: int) -> None:
    # There are fewer blocks than published: only the depth depends on their number.
    config = DiTConfig(32, patch, 4, width, depth // 12, heads, 4 * width, 1000)
    model, _ = maskdit.build(checkpoint(empty(config)), Overrides())
    assert model.network.config == config  # type: ignore[attr-defined]


def test_build_of_maskdit_of_unknown_width_asks_for_heads(tiny_masked: Any) -> None:
    known = r"\(384, 768, 1024, 1152, 1280\)"
    with pytest.raises(UsageError, match=rf"width 32 is not one of upstream's {known}: give `heads`"):
        maskdit.build(checkpoint(empty(tiny_masked.config)), Overrides())
