"""The PyTorch reference of guided sampling, beside the formulas written out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sg_export.loading import LoadedModel, load_model
from sg_export.two_pass import sample
from sg_runtime import random
from sg_runtime.manifest import GuidancePlan, Level
from sg_runtime.pipeline import Pipeline

FULL, MOST, HALF = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8)
NONE = GuidancePlan("none", FULL, FULL, 2.0)
SHAPE = (2, 8, 8)

# FP32 sums in another order, through two or more evaluations of the network.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def velocity(
    loaded: LoadedModel, x: torch.Tensor, t: float, label: int, keep: np.ndarray | None = None
) -> torch.Tensor:
    """One image's prediction."""
    kept = None if keep is None else torch.from_numpy(keep)[None]
    result: torch.Tensor = loaded.model(x[None], torch.tensor([t]), torch.tensor([label]), kept)[0]
    return result


def noise(seed: int) -> torch.Tensor:
    return torch.from_numpy(random.normal(seed, random.INITIAL_NOISE, SHAPE))


def test_sample_of_one_euler_step_is_the_formula(loaded: LoadedModel) -> None:
    plan = GuidancePlan("sg", MOST, HALF, 2.5)
    found = sample(loaded, plan, [3], [7], 1, "euler")
    x = noise(7)
    strong_keep = random.subset(7, 16, 12, step=0, evaluation=0, branch=random.STRONG)
    weak_keep = random.subset(7, 16, 8, step=0, evaluation=0, branch=random.WEAK)
    strong, weak = velocity(loaded, x, 1.0, 3, strong_keep), velocity(loaded, x, 1.0, 3, weak_keep)
    assert found.shape == (1, *SHAPE)
    np.testing.assert_allclose(found[0], (x - (weak + 2.5 * (strong - weak))).numpy(), **CLOSE)


def test_sample_of_cfg_gives_the_weak_branch_no_class(loaded: LoadedModel) -> None:
    plan = GuidancePlan("cfg", FULL, FULL, 3.0)
    found = sample(loaded, plan, [3], [7], 1, "euler")
    x = noise(7)
    strong, weak = velocity(loaded, x, 1.0, 3), velocity(loaded, x, 1.0, 5)
    np.testing.assert_allclose(found[0], (x - (weak + 3.0 * (strong - weak))).numpy(), **CLOSE)


def test_sample_of_two_heun_steps_is_the_formula(loaded: LoadedModel) -> None:
    x = noise(0)
    first = velocity(loaded, x, 1.0, 1)
    second = velocity(loaded, x - 0.5 * first, 0.5, 1)
    x = x - 0.5 * (first + second) / 2
    # The last step ends at t = 0, where no model was trained: it stays an Euler step.
    x = x - 0.5 * velocity(loaded, x, 0.5, 1)
    np.testing.assert_allclose(sample(loaded, NONE, [1], [0], 2, "heun")[0], x.numpy(), **CLOSE)


@pytest.mark.parametrize("mode", ["sg", "cfg"])
def test_sample_at_scale_one_is_the_strong_branch(mode: str, loaded: LoadedModel) -> None:
    plan = GuidancePlan(mode, MOST, HALF if mode == "sg" else MOST, 1.0)  # type: ignore[arg-type]
    alone = replace(plan, mode="none", weak=MOST)
    found = sample(loaded, plan, [0, 4], [1, 2], 3, "euler")
    np.testing.assert_allclose(found, sample(loaded, alone, [0, 4], [1, 2], 3, "euler"), **CLOSE)


def test_sample_of_an_image_is_independent_of_its_batch(loaded: LoadedModel) -> None:
    plan = GuidancePlan("sg", FULL, HALF, 2.0)
    together = sample(loaded, plan, [0, 4, 2], [1, 2, 3], 3, "euler")
    alone = sample(loaded, plan, [4], [2], 3, "euler")
    np.testing.assert_allclose(together[1:2], alone, **CLOSE)
    assert not np.allclose(together[0], together[1], **CLOSE)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("fused", [True, False])
def test_sample_equals_the_runtime(sampler: str, fused: bool, loaded: LoadedModel, tiny_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_bundle, batch=2)
    plan = pipe.guidance(strong_sparsity=0.25)
    wanted = sample(loaded, plan, [0, 4, 5], [9, 8, 7], 4, sampler)  # type: ignore[arg-type]
    found = pipe.sample([0, 4, None], [9, 8, 7], steps=4, sampler=sampler, guidance=plan, fused=fused)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, wanted, **CLOSE)
