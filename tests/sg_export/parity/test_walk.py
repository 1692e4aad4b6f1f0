"""Distances of a bundle's predictions along guided runs."""

from pathlib import Path

import numpy as np
import pytest

from sg_export.loading import LoadedModel, load_model
from sg_export.parity.distances import distance
from sg_export.parity.torch_branches import by_pytorch
from sg_export.parity.walk import by_pipeline, judge, run_distance, walk
from sg_export.quantize.rewrite import reference_pipeline
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import of_classes
from sg_runtime.errors import CheckpointError
from sg_runtime.guidance import built_guidances, guide
from sg_runtime.manifest import GuidancePlan, Labels
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.evaluate import GraphRunner

STEPS = 4
IMAGES = (of_classes(Labels(5, None), [0, 3]), (7, 8))


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return reference_pipeline(Bundle.open(tiny_bundle))


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture
def guidance(pipe: Pipeline) -> GuidancePlan:
    return built_guidances(pipe.bundle.manifest)[0]


def test_by_pipeline_gives_what_the_branches_own_graphs_give(pipe: Pipeline, guidance: GuidancePlan) -> None:
    plan, x = pipe.prepare([0.7, 0.2], *IMAGES, guidance=guidance), pipe.initial_noise(IMAGES[1])
    runner = GraphRunner(pipe.bundle.manifest, pipe.backend.lane(), pipe.batch, pipe.backend.batches)
    for index in (0, 1):
        found, wanted = by_pipeline(pipe)(x, plan, index), runner.branches(x, plan, index)
        for f, w in zip(found, wanted, strict=True):
            # Different graphs sum float32 in different orders.
            np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5)


def test_by_pipeline_of_one_branch_gives_it_twice(pipe: Pipeline, guidance: GuidancePlan) -> None:
    alone = GuidancePlan("none", guidance.strong, guidance.strong, 2.0)
    plan, x = pipe.prepare([0.7], *IMAGES, guidance=alone), pipe.initial_noise(IMAGES[1])
    strong, weak = by_pipeline(pipe)(x, plan, 0)
    np.testing.assert_array_equal(strong, weak)


@pytest.mark.parametrize(
    "name", ["tiny_bundle", "tiny_cfg_bundle", "tiny_cfg_sg_bundle", "tiny_autoguidance_bundle", "tiny_edm_bundle"]
)
def test_by_pytorch_gives_what_a_bundle_gives(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    pipe = reference_pipeline(Bundle.open(path))
    manifest = pipe.bundle.manifest
    loaded = load_model(path.parent / manifest.source.file)
    weak = None if manifest.weak_source is None else load_model(path.parent / manifest.weak_source.file)
    for guidance in built_guidances(manifest):
        plan, x = pipe.prepare([0.7, 0.2], *IMAGES, guidance=guidance), pipe.initial_noise(IMAGES[1])
        for index in (0, 1):
            found = by_pipeline(pipe)(x, plan, index)
            for f, w in zip(found, by_pytorch(loaded, weak, IMAGES[0])(x, plan, index), strict=True):
                # The summation order of float32 differs, over three blocks.
                assert distance(f, w) < 1e-5


def test_judge_of_the_fp32_bundle_beside_pytorch_is_exact(pipe: Pipeline, loaded: LoadedModel) -> None:
    plans = built_guidances(pipe.bundle.manifest)
    walks = [walk(pipe, by_pytorch(loaded, None, IMAGES[0]), plan, *IMAGES, STEPS) for plan in plans]
    quality = judge(pipe, walks)
    assert [q.time for q in quality] == sorted((q.time for q in quality), reverse=True)
    assert len(quality) == STEPS
    for stratum in quality:
        # The same difference; guidance at scale 2 can triple it.
        assert stratum.guided < 3e-5
        assert min(stratum.strong, stratum.weak) > 1 - 1e-9  # 1 - cosine is of the order of distance²
    assert run_distance(pipe, walks) < 1e-4  # four steps with this difference
    assert [q.time for q in judge(pipe, walks, strata=[0, 2])] == [quality[0].time, quality[2].time]


def test_by_pytorch_of_a_network_that_overflows_blames_the_checkpoint(
    pipe: Pipeline, loaded: LoadedModel, guidance: GuidancePlan
) -> None:
    plan, x = pipe.prepare([0.7], *IMAGES, guidance=guidance), pipe.initial_noise(IMAGES[1])
    with pytest.raises(CheckpointError, match=r"for time 0\.7 of a run: its weights overflow"):
        by_pytorch(loaded, None, IMAGES[0])(np.float32(np.inf) * x, plan, 0)


def test_walk_is_the_run_that_the_pipeline_samples(pipe: Pipeline, guidance: GuidancePlan) -> None:
    own = walk(pipe, by_pipeline(pipe), guidance, *IMAGES, STEPS)
    wanted = pipe.sample(*IMAGES, steps=STEPS, sampler="euler", guidance=guidance)
    np.testing.assert_allclose(own.samples, wanted, rtol=1e-3, atol=1e-4)  # rounding of the branches, over four steps
    np.testing.assert_array_equal(own.states[0], pipe.initial_noise(IMAGES[1]))
    assert own.times == (1.0, 0.75, 0.5, 0.25)
    assert own.strong.shape == own.weak.shape == own.states.shape
    step = own.states[0] - 0.25 * guide(own.strong[0], own.weak[0], guidance.scale)
    np.testing.assert_allclose(own.states[1], step, rtol=1e-5, atol=1e-5)  # one float32 rounding, two orders


def test_walk_has_mask_noise_where_tokens_are_left_out(
    pipe: Pipeline, guidance: GuidancePlan, tiny_cfg_bundle: Path
) -> None:
    assert walk(pipe, by_pipeline(pipe), guidance, *IMAGES, STEPS).mask_noise > 1e-3
    assert walk(pipe, by_pipeline(pipe), guidance, *IMAGES, STEPS, noise=False).mask_noise == 0
    dense = reference_pipeline(Bundle.open(tiny_cfg_bundle))
    plan = built_guidances(dense.bundle.manifest)[0]
    assert plan.weak.sparsity == 0
    assert walk(dense, by_pipeline(dense), plan, *IMAGES, STEPS).mask_noise == 0
