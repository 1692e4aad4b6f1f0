"""Loading of a checkpoint as the PyTorch model, the reference of all comparisons."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sg_export
from sg_export.adapters import tread
from sg_export.checkpoint import Overrides
from sg_export.loading import LoadedModel, load_model, load_weak
from sg_runtime.errors import UsageError
from sg_runtime.manifest import Labels, Level, Route


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def test_load_model_gives_an_evaluation_model_without_gradients(loaded: LoadedModel) -> None:
    assert not any(module.training for module in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_load_model_output_depends_on_every_argument(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 2, 8, 8), generator=generator)
    t, classes, keep = torch.tensor([0.2, 0.8]), {"class": torch.tensor([0, 4])}, torch.arange(8).repeat(2, 1)
    base = loaded.model(x, t, classes, keep)
    assert base.shape == x.shape
    changed: list[tuple[Any, ...]] = [
        (x + 1, t, classes, keep),
        (x, t + 0.1, classes, keep),
        (x, t, {"class": classes["class"] + 1}, keep),
    ]
    changed += [(x, t, classes, keep + 8), (x, t, classes, None)]
    assert all(not torch.equal(base[:1], loaded.model(*arguments)[:1]) for arguments in changed)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_load_model_of_pickle_equals_safetensors(suffix: str, tiny: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": tensor for name, tensor in tiny.state().items()}
    path = tiny.save(tmp_path / f"tiny{suffix}", {"model_state_dict": {}, "ema_state_dict": state, "step": 3})
    other = load_model(path)
    assert other.facts == loaded.facts
    assert other.source.weights == "ema"
    mine, theirs = loaded.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_load_model_with_weights_takes_that_set(tiny: Any, tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "tiny.pt", {"model_state_dict": tiny.state(1), "ema_state_dict": tiny.state(2)})
    bias = "network.final_layer.linear.bias"
    assert torch.equal(load_model(path).model.state_dict()[bias], tiny.state(2)["final_layer.linear.bias"])
    model = load_model(path, weights="model").model
    assert torch.equal(model.state_dict()[bias], tiny.state(1)["final_layer.linear.bias"])


@given(sparsity=st.floats(0, 1, exclude_max=True))
def test_level_keeps_by_the_familys_rounding_or_refuses(sparsity: float, loaded: LoadedModel) -> None:
    keep = 16 - int(16 * sparsity)
    if keep == 16 and sparsity > 0:
        with pytest.raises(UsageError, match="keeps all 16 tokens: use 0, or a higher sparsity"):
            loaded.level(sparsity)
    else:
        assert loaded.level(sparsity) == Level(sparsity, keep)


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, math.nan, math.inf, -math.inf])
def test_level_out_of_range_raises(sparsity: float, loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match=rf"^sparsity {sparsity:g}: expected at least 0 and less than 1$"):
        loaded.level(sparsity)


def test_level_of_whole_number_is_a_float(loaded: LoadedModel) -> None:
    assert isinstance(loaded.level(0).sparsity, float)


def test_level_that_keeps_no_token_raises(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Upstream's rounding always keeps one token; the rounding of other families may not.
    monkeypatch.setattr(tread, "kept_count", lambda tokens, sparsity: 0)
    with pytest.raises(UsageError, match="keeps none of the 16 tokens: use a lower sparsity"):
        loaded.level(0.99)


@pytest.mark.parametrize(("depth", "usual"), [(12, "2-8"), (28, "2-24")])
def test_level_without_route_shows_upstreams_usual(depth: int, usual: str, loaded: LoadedModel) -> None:
    unknown = replace(loaded, facts=replace(loaded.facts, depth=depth, route=None))
    assert unknown.level(0) == Level(0.0, 16)
    with pytest.raises(UsageError) as caught:
        unknown.level(0.5)
    assert str(caught.value) == (
        "tiny.safetensors: the route is unknown, so no branch can be sparse: give `route` START-END, both blocks "
        f"included; upstream's route for {depth} blocks is {usual}"
    )


def test_load_weak_has_its_own_weights_and_the_strong_models_facts(
    tiny: Any, loaded: LoadedModel, tmp_path: Path
) -> None:
    # An earlier file of the run, without a sidecar.
    path = tiny.save(tmp_path / "early.pt", {"model_state_dict": tiny.state(1), "ema_state_dict": tiny.state(2)}, {})
    weak = load_weak(path, loaded, None)
    assert weak.facts == loaded.facts
    assert (weak.source.file, weak.source.weights) == ("early.pt", "ema")
    bias = "network.final_layer.linear.bias"
    assert torch.equal(weak.model.state_dict()[bias], tiny.state(2)["final_layer.linear.bias"])
    assert torch.equal(load_weak(path, loaded, "model").model.state_dict()[bias], loaded.model.state_dict()[bias])


def test_load_weak_takes_the_strong_models_names_of_classes(tiny: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    named = replace(loaded, facts=replace(loaded.facts, conditions=Labels(5, tuple("abcde")), space="pixel"))
    path = tiny.save(tmp_path / "early.safetensors", facts={**tiny.facts, "class_names": list("vwxyz")})
    assert load_weak(path, named, None).facts == named.facts


# The facts in the files differ: they are from two runs, though their tensors have the same shapes.
@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"prediction": "edm"}, "prediction: expected flow, found edm"),
        ({"heads": 4}, "heads: expected 2, found 4"),
        ({"route": "0-1", "heads": 4}, "heads: expected 2, found 4; route: expected 1-1, found 0-1"),
    ],
)
def test_load_weak_of_another_run_names_what_differs(
    stated: dict[str, Any], told: str, tiny: Any, loaded: LoadedModel, tmp_path: Path
) -> None:
    path = tiny.save(tmp_path / "early.safetensors", facts={**tiny.facts, **stated})
    with pytest.raises(UsageError) as caught:
        load_weak(path, loaded, None)
    assert str(caught.value) == (
        f"early.safetensors: expected an earlier checkpoint of the network in tiny.safetensors; {told}"
    )


def test_load_weak_with_overrides_states_them_of_both(tiny: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    overrides = Overrides(Route(0, 2), 4, "edm")
    strong = load_model(tiny_checkpoint, overrides=overrides)
    weak = load_weak(tiny.save(tmp_path / "early.safetensors"), strong, None, overrides)
    assert weak.facts == strong.facts
    assert (weak.facts.route, weak.facts.heads, weak.facts.prediction) == (Route(0, 2), 4, "edm")


def test_load_model_by_reference_name_is_the_shipped_model() -> None:
    loaded = load_model("glyphs")
    assert (loaded.facts.depth, loaded.facts.width, loaded.facts.route) == (8, 128, Route(1, 6))
    assert loaded.facts.space == "pixel"


def test_public_names_are_those_of_their_modules(tiny_checkpoint: Path) -> None:
    assert sg_export.load_model is load_model
    assert all(getattr(sg_export, name) is not None for name in sg_export.__all__)
    overridden = sg_export.load_model(tiny_checkpoint, overrides=sg_export.Overrides(Route(0, 2)))
    assert overridden.facts.route == Route(0, 2)
    with pytest.raises(AttributeError, match="module 'sg_export' has no attribute 'absent'"):
        _ = sg_export.absent
    assert Overrides is sg_export.Overrides
