"""Both branches in one packed pass compared with two passes.

The comparison covers shapes, routes, pairs and both families.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sg_export.loading import LoadedModel
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import Route

# FP32 rounds to 6e-8, and sums of another length accumulate the rounding in another order: at most
# 1.6e-6 in 3000 random cases. Inputs of the other branch change the result by 1e-2 or more: see
# `test_guided_depends_on_each_branch`.
BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """A random network and its inputs.

    network: class of the network.
    config: shape of the network.
    route: route of the network.
    strong: number of tokens that the strong branch keeps; None for all.
    weak: number of tokens that the weak branch keeps; None for all.
    null: whether the weak branch has no class.
    images: number of images.
    scale: guidance scale.
    seed: seed of the inputs.
    """

    network: type[DiT]
    config: DiTConfig
    route: Route
    strong: int | None
    weak: int | None
    null: bool
    images: int
    scale: float
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    def integers(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    heads, side, depth = integers(1, 3), integers(1, 4), integers(1, 4)
    start = integers(0, depth - 1)
    config = DiTConfig(
        image_size=2 * side,
        patch=2,
        channels=integers(1, 3),
        width=heads * 2 * integers(2, 6),
        depth=depth,
        heads=heads,
        mlp_width=integers(4, 40),
        num_classes=integers(1, 5),
    )
    keeps = st.one_of(st.none(), st.integers(1, side * side))
    return Case(
        network=draw(st.sampled_from([DiT, MaskDiT])),
        config=config,
        route=Route(start, integers(start, depth - 1)),
        strong=draw(keeps),
        weak=draw(keeps),
        null=draw(st.booleans()),
        images=integers(1, 3),
        scale=draw(st.floats(-2, 4)),
        seed=integers(0, 99),
    )


def subset(tokens: int, keep: int | None, images: int, generator: torch.Generator) -> Tensor | None:
    """Return sorted distinct indices (images, keep), or None to keep all tokens."""
    if keep is None:
        return None
    order = torch.rand((images, tokens), generator=generator).argsort(dim=1)
    return order[:, :keep].sort(dim=1).values


def inputs(case: Case, loaded: LoadedModel) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return x, modulations, keep_strong, keep_weak and modulations_weak.

    modulations_weak is None if the weak branch has the same modulations.
    """
    config, generator = case.config, torch.Generator().manual_seed(case.seed)
    x = torch.randn((case.images, config.channels, config.image_size, config.image_size), generator=generator)
    t = torch.rand(case.images, generator=generator)
    classes = torch.randint(config.num_classes, (case.images,), generator=generator)
    strong, weak = (subset(config.tokens, keep, case.images, generator) for keep in (case.strong, case.weak))
    nothing = torch.full_like(classes, config.num_classes)
    own = loaded.model.condition(t, nothing) if case.null else None
    return x, loaded.model.condition(t, classes), strong, weak, own


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the relative L2 distance."""
    return float((found - wanted).norm() / wanted.norm())


SMALL = DiTConfig(image_size=6, patch=2, channels=2, width=12, depth=3, heads=2, mlp_width=20, num_classes=3)


@given(case=cases())
@example(case=Case(DiT, SMALL, Route(0, 2), 5, 3, False, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(0, 2), 5, 3, True, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(2, 2), None, 3, False, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(0, 0), None, 3, True, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(1, 1), 4, 4, False, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(1, 2), 2, 7, False, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(1, 1), 3, None, True, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(1, 1), None, None, False, 2, 2.5, 0))
@example(case=Case(DiT, SMALL, Route(1, 1), None, None, True, 2, 2.5, 0))
@example(case=Case(MaskDiT, SMALL, Route(0, 0), 5, 3, False, 2, 2.5, 0))
@example(case=Case(MaskDiT, SMALL, Route(0, 0), None, 3, True, 2, 2.5, 0))
def test_guided_is_the_combination_of_two_passes(case: Case, make_model: Callable[..., LoadedModel]) -> None:
    loaded = make_model(case.network, case.config, case.route, case.seed)
    x, modulations, keep_strong, keep_weak, own = inputs(case, loaded)
    scale = torch.tensor(case.scale)
    found = loaded.model.guided(x, modulations, keep_strong, keep_weak, scale, own)
    strong = loaded.model.predict(x, modulations, keep_strong)
    weak = loaded.model.predict(x, modulations if own is None else own, keep_weak)
    assert distance(found, weak + scale * (strong - weak)) <= BOUND


@pytest.mark.parametrize("network", [DiT, MaskDiT])
@pytest.mark.parametrize("null", [False, True], ids=["same class", "no class"])
def test_guided_depends_on_each_branch(null: bool, network: type[DiT], make_model: Callable[..., LoadedModel]) -> None:
    case = Case(network, SMALL, Route(1, 1), 5, 3, null, 2, 2.5, 0)
    loaded = make_model(network, SMALL, case.route)
    x, modulations, keep_strong, keep_weak, own = inputs(case, loaded)
    assert keep_strong is not None
    assert keep_weak is not None
    scale = torch.tensor(case.scale)

    def guided(strong: Tensor, weak: Tensor, scale: Tensor = scale, own: Tensor | None = own) -> Tensor:
        return loaded.model.guided(x, modulations, strong, weak, scale, own)

    base = guided(keep_strong, keep_weak)
    others = [guided(keep_strong.flip(0), keep_weak), guided(keep_strong, keep_weak.flip(0))]
    others += [guided(keep_strong, keep_weak, scale + 0.1)]
    others += [guided(keep_strong, keep_weak, own=own.flip(1))] if own is not None else []
    assert all(distance(other, base) > 1e-2 for other in others)


@pytest.mark.parametrize("network", [DiT, MaskDiT])
def test_guided_of_an_image_is_independent_of_its_batch(
    network: type[DiT], make_model: Callable[..., LoadedModel]
) -> None:
    case = Case(network, SMALL, Route(1, 1), 5, 3, True, 3, 2.5, 0)
    loaded = make_model(network, SMALL, case.route)
    given_inputs = inputs(case, loaded)
    x, modulations, strong, weak, own = (value for value in given_inputs if value is not None)
    together = loaded.model.guided(x, modulations, strong, weak, torch.tensor(2.5), own)
    for k in range(case.images):
        one = slice(k, k + 1)
        alone = loaded.model.guided(x[one], modulations[one], strong[one], weak[one], torch.tensor(2.5), own[one])
        assert distance(together[one], alone) <= BOUND


@pytest.mark.parametrize("null", [False, True], ids=["same class", "no class"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guided_at_the_ends_of_the_scale_is_one_branch(
    scale: float, null: bool, make_model: Callable[..., LoadedModel]
) -> None:
    case = Case(DiT, SMALL, Route(1, 1), 5, 3, null, 2, scale, 0)
    loaded = make_model(DiT, SMALL, case.route)
    x, modulations, strong, weak, own = inputs(case, loaded)
    branch = loaded.model.predict(x, modulations, strong)
    if scale == 0:
        branch = loaded.model.predict(x, modulations if own is None else own, weak)
    assert distance(loaded.model.guided(x, modulations, strong, weak, torch.tensor(scale), own), branch) <= BOUND


def test_forward_is_condition_then_predict(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model(DiT, SMALL, Route(1, 1)).model
    x, t, classes = torch.full((1, 2, 6, 6), 0.5), torch.tensor([0.3]), torch.tensor([2])
    assert torch.equal(model(x, t, classes), model.predict(x, model.condition(t, classes)))
    assert math.isfinite(float(model(x, t, classes).norm()))


@pytest.mark.parametrize(("network", "end"), [(DiT, 1), (MaskDiT, 2)])
def test_forward_in_bf16_takes_times_in_fp32(network: type[DiT], end: int) -> None:
    """The PyTorch baseline of `bench` calls the model in this way on a GPU."""
    config = DiTConfig(image_size=4, patch=2, channels=1, width=8, depth=2, heads=2, mlp_width=16, num_classes=3)
    model = SparseModel(network(config), Route(0, end)).to(torch.bfloat16)
    x, keep = torch.randn(2, 1, 4, 4, dtype=torch.bfloat16), torch.tensor([[0, 2], [1, 3]])
    assert model(x, torch.rand(2), torch.tensor([0, 1]), keep).dtype == torch.bfloat16
