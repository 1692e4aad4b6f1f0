"""Both branches in one packed pass compared with two passes.

The comparison covers shapes, routes, pairs, both families and a network with text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from text import SmallPRX, conditions_of, held_by_branches
from torch import Tensor

from sg_export.graph.spec import conditioned
from sg_export.loading import LoadedModel
from sg_export.models import prx
from sg_export.models.dit import DiT, DiTConfig, modulate
from sg_export.models.maskdit import MaskDiT
from sg_export.models.sparse import BranchInputs, SparseModel
from sg_runtime.manifest import Route

# FP32 rounds to 6e-8, and sums of another length accumulate the rounding in another order: at most
# 1.6e-6 in 3000 random cases. Inputs of the other branch change the result by 1e-3 or more: see
# `test_guided_depends_on_each_branch`.
BOUND = 1e-5

NETWORKS = [DiT, MaskDiT, SmallPRX]


@dataclass(frozen=True)
class Case:
    """A random network and its inputs.

    network: class of the network.
    config: shape of the network.
    route: route of the network.
    strong: number of tokens that the strong branch keeps; None for all.
    weak: number of tokens that the weak branch keeps; None for all.
    null: whether the weak branch has no class, or text of its own.
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
        width=heads * 4 * integers(1, 3),
        depth=depth,
        heads=heads,
        mlp_width=integers(4, 40),
        num_classes=integers(1, 5),
    )
    keeps = st.one_of(st.none(), st.integers(1, side * side))
    return Case(
        network=draw(st.sampled_from(NETWORKS)),
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


def inputs(case: Case, loaded: LoadedModel) -> tuple[Tensor, BranchInputs, BranchInputs]:
    """Return x and the inputs of the strong and the weak branch."""
    config, generator = case.config, torch.Generator().manual_seed(case.seed)
    x = torch.randn((case.images, config.channels, config.image_size, config.image_size), generator=generator)
    t = torch.rand(case.images, generator=generator)
    classes = torch.randint(config.num_classes, (case.images,), generator=generator)
    keeps = [subset(config.tokens, keep, case.images, generator) for keep in (case.strong, case.weak)]
    nothing = config.num_classes if case.null else None
    held = held_by_branches(loaded.model, t, classes, nothing, generator)
    strong, weak = (BranchInputs(*given) for given in zip(held, keeps, strict=True))
    return x, strong, weak


def changed(branch: BranchInputs, change: Callable[[Tensor], Tensor]) -> BranchInputs:
    """Return the branch with changed kept tokens."""
    assert isinstance(branch.keep, Tensor)
    return replace(branch, keep=change(branch.keep))


def only(branch: BranchInputs, images: slice) -> BranchInputs:
    """Return the inputs of some of the images."""
    held = {name: values[images] for name, values in branch.held.items()}
    return replace(changed(branch, lambda keep: keep[images]), held=held)


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
@example(case=Case(SmallPRX, SMALL, Route(1, 1), None, 3, False, 2, 2.5, 0))
@example(case=Case(SmallPRX, SMALL, Route(1, 1), None, None, True, 2, 2.5, 0))
@example(case=Case(SmallPRX, SMALL, Route(1, 1), None, 3, True, 2, 2.5, 0))
@example(case=Case(SmallPRX, SMALL, Route(0, 2), 5, 3, True, 2, 2.5, 0))
def test_guided_is_the_combination_of_two_passes(case: Case, make_model: Callable[..., LoadedModel]) -> None:
    loaded = make_model(case.network, case.config, case.route, case.seed)
    x, *branches = inputs(case, loaded)
    scale = torch.tensor(case.scale)
    found = loaded.model.guided(x, *branches, scale)
    strong, weak = (loaded.model.predict(x, branch.held, branch.keep) for branch in branches)
    assert distance(found, weak + scale * (strong - weak)) <= BOUND


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("null", [False, True], ids=["same class", "no class"])
def test_guided_depends_on_each_branch(null: bool, network: type[DiT], make_model: Callable[..., LoadedModel]) -> None:
    case = Case(network, SMALL, Route(1, 1), 5, 3, null, 2, 2.5, 0)
    loaded = make_model(network, SMALL, case.route)
    x, strong, weak = inputs(case, loaded)
    scale = torch.tensor(case.scale)
    base = loaded.model.guided(x, strong, weak, scale)
    own = [name for name in weak.held if weak.held[name] is not strong.held[name]]
    assert own == (list(conditioned(weak.held)) if null else [])
    weaks = [replace(weak, held={**weak.held, name: weak.held[name].flip(-1)}) for name in own]
    others = [
        loaded.model.guided(x, changed(strong, lambda keep: keep.flip(0)), weak, scale),
        loaded.model.guided(x, strong, changed(weak, lambda keep: keep.flip(0)), scale),
        loaded.model.guided(x, strong, weak, scale + 0.1),
        *(loaded.model.guided(x, strong, other, scale) for other in weaks),
    ]
    assert all(distance(other, base) > 1e-3 for other in others)


@pytest.mark.parametrize("network", NETWORKS)
def test_guided_of_an_image_is_independent_of_its_batch(
    network: type[DiT], make_model: Callable[..., LoadedModel]
) -> None:
    case = Case(network, SMALL, Route(1, 1), 5, 3, True, 3, 2.5, 0)
    loaded = make_model(network, SMALL, case.route)
    x, *branches = inputs(case, loaded)
    together = loaded.model.guided(x, *branches, torch.tensor(2.5))
    for k in range(case.images):
        one = slice(k, k + 1)
        strong, weak = (only(branch, one) for branch in branches)
        alone = loaded.model.guided(x[one], strong, weak, torch.tensor(2.5))
        assert distance(together[one], alone) <= BOUND


@pytest.mark.parametrize("network", [DiT, SmallPRX])
@pytest.mark.parametrize("null", [False, True], ids=["same class", "no class"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guided_at_the_ends_of_the_scale_is_one_branch(
    scale: float, null: bool, network: type[DiT], make_model: Callable[..., LoadedModel]
) -> None:
    case = Case(network, SMALL, Route(1, 1), 5, 3, null, 2, scale, 0)
    loaded = make_model(network, SMALL, case.route)
    x, strong, weak = inputs(case, loaded)
    alone = strong if scale == 1 else weak
    branch = loaded.model.predict(x, alone.held, alone.keep)
    assert distance(loaded.model.guided(x, strong, weak, torch.tensor(scale)), branch) <= BOUND


@pytest.mark.parametrize(("null", "prefix"), [(False, 9), (True, 18)], ids=["same text", "other text"])
def test_guided_modulates_all_rows_at_once_and_shares_the_prefix_if_the_text_is_the_same(
    null: bool, prefix: int, make_model: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(SmallPRX, SMALL, Route(1, 1), None, 3, null, 2, 2.5, 0)
    loaded, rows = make_model(SmallPRX, SMALL, case.route), list[int]()

    def counted(part: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        rows.append(part.shape[1])
        return modulate(part, shift, scale)

    monkeypatch.setattr(prx, "modulate", counted)
    loaded.model.guided(*inputs(case, loaded), torch.tensor(2.5))
    assert rows == [prefix, prefix, 12, 12, 18, 18]  # twice in each block


def test_forward_is_condition_then_predict(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model(DiT, SMALL, Route(1, 1)).model
    x, t, classes = torch.full((1, 2, 6, 6), 0.5), torch.tensor([0.3]), torch.tensor([2])
    (modulations,) = model.hoist("condition", {"t": t, "class": classes})
    found = model(x, t, {"class": classes})
    assert torch.equal(found, model.predict(x, {"modulations": modulations}))
    assert math.isfinite(float(found.norm()))


@pytest.mark.parametrize(("network", "end"), [(DiT, 1), (MaskDiT, 2), (SmallPRX, 1)])
def test_forward_in_bf16_takes_times_in_fp32(network: type[DiT], end: int) -> None:
    """The PyTorch baseline of `bench` calls the model in this way on a GPU."""
    config = DiTConfig(image_size=4, patch=2, channels=1, width=8, depth=2, heads=2, mlp_width=16, num_classes=3)
    model = SparseModel(network(config), Route(0, end)).to(torch.bfloat16)
    x, keep = torch.randn(2, 1, 4, 4, dtype=torch.bfloat16), torch.tensor([[0, 2], [1, 3]])
    conditions = conditions_of(model, torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert model(x, torch.rand(2), conditions, keep).dtype == torch.bfloat16
