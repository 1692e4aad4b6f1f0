"""The PyTorch reference of guided sampling, compared with explicit formulas."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sg_export.loading import LoadedModel, load_model, load_weak
from sg_export.parity import two_pass
from sg_runtime import philox
from sg_runtime.conditions import of_classes
from sg_runtime.guidance import levels
from sg_runtime.manifest import GuidancePlan, Karras, Level, Sampling
from sg_runtime.pipeline import Pipeline
from sg_runtime.sampling import Churn

FULL, MOST, HALF = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8)
BUILT = (FULL, MOST, HALF)
NONE = GuidancePlan("none", FULL, FULL, 2.0)
NOISE_LEVELS = Karras(0.02, 40.0, 7.0)
SHAPE = (2, 8, 8)
NO_CLASS = 5


def sample(loaded: LoadedModel, plan: GuidancePlan, classes: Sequence[int], *rest: Any, **settings: Any) -> Any:
    """Sample images of these classes; 5 is "no class"."""
    return two_pass.sample(loaded, plan, of_classes(loaded.facts.labels, classes), *rest, **settings)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def earlier(loaded: LoadedModel, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The same network with other weights."""
    path = tiny.save(tmp_path_factory.mktemp("earlier") / "earlier.safetensors", tiny.state(seed=2))
    return load_weak(path, loaded, None)


@pytest.fixture(scope="module")
def edm(loaded: LoadedModel) -> LoadedModel:
    """The same network, used as a denoiser."""
    sampling = Sampling("heun", 40, NOISE_LEVELS)
    return replace(loaded, facts=replace(loaded.facts, prediction="edm"), sampling=sampling)


def velocity(loaded: LoadedModel, x: Tensor, t: float, label: int, keep: NDArray[np.int64] | None = None) -> Tensor:
    """Return the network's output for one image."""
    kept = None if keep is None else torch.from_numpy(keep)[None]
    output: Tensor = loaded.model(x[None], torch.tensor([t]), {"class": torch.tensor([label])}, kept)[0]
    return output


def denoised(loaded: LoadedModel, x: Tensor, sigma: float, label: int, keep: NDArray[np.int64] | None = None) -> Tensor:
    """Return the denoised image: Karras et al. 2022, eq. 7 and table 1.

    The standard deviation of the data is 0.5.
    """
    c_in, c_noise = 1 / math.sqrt(sigma**2 + 0.25), math.log(sigma) / 4
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.sqrt(sigma**2 + 0.25)
    return c_skip * x + c_out * velocity(loaded, c_in * x, c_noise, label, keep)


def noise(seed: int, purpose: int = philox.INITIAL_NOISE, step: int = 0) -> Tensor:
    return torch.from_numpy(philox.normal(seed, purpose, SHAPE, step=step))


def subset(
    seed: int, level: Level, branch: int = philox.STRONG, step: int = 0, evaluation: int = 0
) -> NDArray[np.int64] | None:
    """Return the kept tokens that the runtime draws for an image, or None to keep all."""
    if level == FULL:
        return None
    return philox.subset(seed, 16, level.keep, step=step, evaluation=evaluation, branch=branch)


def assert_close(found: NDArray[np.float32], wanted: Tensor | NDArray[np.float32]) -> None:
    # FP32 sums in another order, over several evaluations that guidance amplifies, differed by at
    # most 2e-6 when measured. A wrong class, kept token, time or network differs by 1e-2 or more.
    assert np.linalg.norm(found - np.asarray(wanted)) <= 2e-5 * np.linalg.norm(np.asarray(wanted))


@pytest.mark.parametrize(
    ("plan", "no_class", "other"),
    [
        (GuidancePlan("sg", FULL, HALF, 2.5), False, False),
        (GuidancePlan("sg", MOST, HALF, 2.5), False, False),
        (GuidancePlan("cfg", FULL, FULL, 3.0), True, False),
        (GuidancePlan("cfg", MOST, MOST, 3.0), True, False),
        (GuidancePlan("cfg+sg", MOST, HALF, 1.5), True, False),
        (GuidancePlan("autoguidance", FULL, HALF, 2.5), False, True),
        (GuidancePlan("autoguidance", HALF, HALF, 2.5), False, True),
        (GuidancePlan("autoguidance", HALF, FULL, -0.5), False, True),
    ],
    ids=lambda value: f"{value.mode} {value.strong.keep} {value.weak.keep}" if isinstance(value, GuidancePlan) else "",
)
def test_sample_of_one_euler_step_is_the_formula(
    plan: GuidancePlan, no_class: bool, other: bool, loaded: LoadedModel, earlier: LoadedModel
) -> None:
    found = sample(loaded, plan, [3], [7], 1, "euler", weak=earlier if other else None)
    x = noise(7)
    strong = velocity(loaded, x, 1.0, 3, subset(7, plan.strong))
    weak = velocity(
        earlier if other else loaded, x, 1.0, NO_CLASS if no_class else 3, subset(7, plan.weak, philox.WEAK)
    )
    assert found.shape == (1, *SHAPE)
    assert found.dtype == np.float32
    assert_close(found[0], x - (weak + plan.scale * (strong - weak)))


def test_sample_without_guidance_is_the_strong_branch(loaded: LoadedModel) -> None:
    plan = GuidancePlan("none", MOST, MOST, 2.5)
    x = noise(7)
    assert_close(sample(loaded, plan, [3], [7], 1, "euler")[0], x - velocity(loaded, x, 1.0, 3, subset(7, MOST)))


def test_sample_of_two_heun_steps_is_the_formula(loaded: LoadedModel) -> None:
    plan = GuidancePlan("sg", FULL, HALF, 2.0)

    def guided(x: Tensor, t: float, step: int, evaluation: int) -> Tensor:
        keep = subset(0, HALF, philox.WEAK, step, evaluation)
        strong, weak = velocity(loaded, x, t, 1), velocity(loaded, x, t, 1, keep)
        return weak + 2.0 * (strong - weak)

    x = noise(0)
    first = guided(x, 1.0, 0, 0)
    second = guided(x - 0.5 * first, 0.5, 0, 1)
    x = x - 0.5 * (first + second) / 2
    # The last step ends at t = 0, where no model was trained: it stays an Euler step.
    x = x - 0.5 * guided(x, 0.5, 1, 0)
    assert_close(sample(loaded, plan, [1], [0], 2, "heun")[0], x)


def test_sample_of_edm_by_euler_is_the_formula(edm: LoadedModel) -> None:
    plan = GuidancePlan("cfg+sg", MOST, HALF, 1.5)
    x = 40.0 * noise(4)
    for step, (sigma, following) in enumerate(((40.0, 0.02), (0.02, 0.0))):
        strong = denoised(edm, x, sigma, 2, subset(4, MOST, step=step))
        weak = denoised(edm, x, sigma, NO_CLASS, subset(4, HALF, philox.WEAK, step))
        guided = weak + 1.5 * (strong - weak)
        x = x + (following - sigma) * (x - guided) / sigma
    assert_close(sample(edm, plan, [2], [4], 2, "euler")[0], x)


def test_sample_of_edm_by_heun_is_the_formula(edm: LoadedModel) -> None:
    x = 40.0 * noise(4)
    slope = (x - denoised(edm, x, 40.0, 2)) / 40.0
    ahead = x + (0.02 - 40.0) * slope
    x = x + (0.02 - 40.0) * (slope + (ahead - denoised(edm, ahead, 0.02, 2)) / 0.02) / 2
    x = denoised(edm, x, 0.02, 2)  # the last step, an Euler step to 0
    assert_close(sample(edm, NONE, [2], [4], 2, "heun")[0], x)


@pytest.mark.parametrize("autoguided", [False, True])
def test_sample_of_edm_guides_denoised_images(autoguided: bool, edm: LoadedModel, earlier: LoadedModel) -> None:
    plan = GuidancePlan("autoguidance" if autoguided else "cfg", FULL, FULL, 2.0)
    x = 40.0 * noise(4)
    strong = denoised(edm, x, 40.0, 2)
    weak = denoised(earlier, x, 40.0, 2) if autoguided else denoised(edm, x, 40.0, NO_CLASS)
    found = sample(edm, plan, [2], [4], 1, "euler", weak=earlier if autoguided else None)
    assert_close(found[0], weak + 2.0 * (strong - weak))


def test_sample_with_churn_adds_noise_first(edm: LoadedModel) -> None:
    # Karras et al. 2022, algorithm 2: gamma is 0.6 / 2 steps at the first sigma. It is 0 at the
    # second sigma, which is out of range.
    churn = Churn(0.6, low=1.0, high=50.0, noise=1.1)
    sigma = 40.0 * 1.3
    x = 40.0 * noise(4) + 1.1 * math.sqrt(sigma**2 - 40.0**2) * noise(4, philox.CHURN, 0)
    slope = (x - denoised(edm, x, sigma, 2)) / sigma
    ahead = x + (0.02 - sigma) * slope
    x = x + (0.02 - sigma) * (slope + (ahead - denoised(edm, ahead, 0.02, 2)) / 0.02) / 2
    x = denoised(edm, x, 0.02, 2)
    found = sample(edm, NONE, [2], [4], 2, "heun", churn=churn)
    assert_close(found[0], x)


def test_sample_with_churn_stops_at_its_bound(edm: LoadedModel) -> None:
    sigma = 40.0 * math.sqrt(2)  # gamma is at most sqrt(2) - 1
    x = 40.0 * noise(4) + math.sqrt(sigma**2 - 40.0**2) * noise(4, philox.CHURN, 0)
    found = sample(edm, NONE, [2], [4], 1, "euler", churn=Churn(9.0))
    assert_close(found[0], denoised(edm, x, sigma, 2))


def test_sample_along_a_cosine_goes_by_way_of_what_was_built(loaded: LoadedModel) -> None:
    plan = GuidancePlan("sg", FULL, HALF, 3.0, strong_last=HALF, weak_last=FULL, scale_last=1.5)
    x = noise(2)
    # The middle of half a cosine is the mean of its ends.
    for step, (strong_level, weak_level, scale) in enumerate(
        ((FULL, HALF, 3.0), (MOST, MOST, 2.25), (HALF, FULL, 1.5))
    ):
        t = 1 - step / 3
        strong = velocity(loaded, x, t, 1, subset(2, strong_level, philox.STRONG, step))
        weak = velocity(loaded, x, t, 1, subset(2, weak_level, philox.WEAK, step))
        x = x - (weak + scale * (strong - weak)) / 3
    assert_close(sample(loaded, plan, [1], [2], 3, "euler", levels=BUILT)[0], x)


def test_sample_of_another_network_goes_by_way_of_its_own_levels(loaded: LoadedModel, earlier: LoadedModel) -> None:
    plan = GuidancePlan("autoguidance", FULL, HALF, 2.0, weak_last=FULL)
    x = noise(2)
    for step, level in enumerate((HALF, MOST, FULL)):
        t = 1 - step / 3
        strong, weak = velocity(loaded, x, t, 1), velocity(earlier, x, t, 1, subset(2, level, philox.WEAK, step))
        x = x - (weak + 2.0 * (strong - weak)) / 3
    found = sample(loaded, plan, [1], [2], 3, "euler", weak=earlier, levels=(FULL,), weak_levels=BUILT)
    assert_close(found[0], x)


def test_sample_outside_the_interval_is_the_strong_branch(loaded: LoadedModel) -> None:
    plan = GuidancePlan("sg", FULL, HALF, 3.0, interval=(0.5, 0.75))
    x = noise(2)
    for step, t in enumerate((1.0, 0.75, 0.5, 0.25)):
        prediction = velocity(loaded, x, t, 1)
        if t in (0.75, 0.5):
            weak = velocity(loaded, x, t, 1, subset(2, HALF, philox.WEAK, step))
            prediction = weak + 3.0 * (prediction - weak)
        x = x - prediction / 4
    assert_close(sample(loaded, plan, [1], [2], 4, "euler")[0], x)


@pytest.mark.parametrize(
    "plan",
    [
        GuidancePlan("sg", MOST, HALF, 1.0),
        GuidancePlan("cfg", MOST, MOST, 1.0),
        GuidancePlan("cfg+sg", MOST, HALF, 1.0),
        GuidancePlan("autoguidance", MOST, HALF, 1.0),
    ],
    ids=lambda plan: plan.mode,
)
def test_sample_at_scale_one_is_the_strong_branch(
    plan: GuidancePlan, loaded: LoadedModel, earlier: LoadedModel
) -> None:
    weak = earlier if plan.mode == "autoguidance" else None
    found = sample(loaded, plan, [0, 4], [1, 2], 3, "euler", weak=weak)
    assert_close(found, sample(loaded, replace(plan, mode="none", weak=MOST), [0, 4], [1, 2], 3, "euler"))


def test_sample_of_an_image_is_independent_of_its_batch(edm: LoadedModel) -> None:
    plan, settings = GuidancePlan("cfg+sg", FULL, HALF, 2.0), {"churn": Churn(1.0)}
    together = sample(edm, plan, [0, 4, 2], [1, 2, 3], 3, "euler", **settings)  # type: ignore[arg-type]
    alone = sample(edm, plan, [4], [2], 3, "euler", **settings)  # type: ignore[arg-type]
    assert_close(together[1:2], alone)
    assert np.linalg.norm(together[0] - together[1]) > 0.1 * np.linalg.norm(together[1])


BUNDLES = ("tiny", "tiny_cfg", "tiny_cfg_sg", "tiny_autoguidance", "tiny_cosine", "tiny_edm")


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", BUNDLES)
def test_sample_equals_the_runtime(
    name: str, fused: bool, sampler: Any, loaded: LoadedModel, earlier: LoadedModel, request: pytest.FixtureRequest
) -> None:
    pipe = Pipeline.load(request.getfixturevalue(f"{name}_bundle"))
    manifest = pipe.bundle.manifest
    model = replace(loaded, facts=manifest.model, sampling=manifest.sampling)
    churn = Churn(1.0) if name == "tiny_edm" else None
    wanted = sample(
        model,
        manifest.guidance,
        [0, 4, NO_CLASS],
        [9, 8, 7],
        6,
        sampler,
        weak=earlier if name == "tiny_autoguidance" else None,
        levels=levels(manifest),
        weak_levels=levels(manifest, manifest.guidance.row.weak_network),
        churn=churn,
    )
    found = pipe.sample([0, 4, None], [9, 8, 7], steps=6, sampler=sampler, churn=churn, fused=fused)
    assert_close(found, wanted)
