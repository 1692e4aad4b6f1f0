"""Sampling from bundles of a text model, compared with PyTorch in separate passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prx_folders import CONFIG, state_of, write_pipeline

from sg_export.checkpoint import Overrides
from sg_export.loading import LoadedModel, load_model
from sg_export.parity import two_pass
from sg_export.parity.distances import distance
from sg_runtime.conditions import Conditions, examples
from sg_runtime.errors import UsageError
from sg_runtime.guidance import levels
from sg_runtime.manifest import Route
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.launches import launches

pytestmark = pytest.mark.slow

OVERRIDES = Overrides(Route(1, 1), size=(128, 192), text_tokens=CONFIG.text_tokens)
SEEDS = [3, 4, 5]
STEPS = 3

# Between PyTorch and ONNX Runtime, multiplied by guidance and steps: about 1e-6.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def folder(once: Callable[..., Path]) -> Path:
    """Return a pipeline folder of latents with 24 image tokens and 3 text tokens."""
    return once("latents", lambda path: write_pipeline(path, CONFIG, state_of(CONFIG)))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, overrides=OVERRIDES)


@pytest.fixture(scope="module", params=["sg", "cfg", "cfg+sg"])
def pipe(request: pytest.FixtureRequest, folder: Path, build_once: Callable[..., Path]) -> Pipeline:
    """Return a pipeline of two images per run, with guided graphs of one mode."""
    rates = {"strong_sparsity": (0.0, 0.25)} | ({} if request.param == "cfg" else {"sparsity": (0.5,)})
    name = f"latents-{request.param}"
    return Pipeline.load(build_once(name, folder, guidance=request.param, overrides=OVERRIDES, batch=2, **rates))


@pytest.fixture(scope="module")
def three(pipe: Pipeline) -> Conditions:
    """Return three prompts of different lengths, with a negative prompt."""
    return examples(pipe.bundle.manifest.model, 3, seed=4)


def expected_of(loaded: LoadedModel, pipe: Pipeline, three: Conditions, plan: Any, sampler: Any = "euler") -> Any:
    return two_pass.sample(loaded, plan, three, SEEDS, STEPS, sampler, levels=levels(pipe.bundle.manifest))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("fused", [True, False], ids=["one graph", "two graphs"])
@pytest.mark.parametrize("strong", [0.0, 0.25])
def test_sample_agrees_with_pytorch_in_two_passes(
    pipe: Pipeline, loaded: LoadedModel, three: Conditions, sampler: Any, fused: bool, strong: float
) -> None:
    plan = pipe.guidance(strong_sparsity=strong)
    found = pipe.sample(three, SEEDS, steps=STEPS, sampler=sampler, guidance=plan, fused=fused)
    assert distance(found, expected_of(loaded, pipe, three, plan, sampler)) < CLOSE


def test_sample_depends_on_every_prompt(pipe: Pipeline, three: Conditions) -> None:
    rows, negative = three.rows(weak=False), three.rows(weak=True)
    plan = pipe.bundle.manifest.guidance

    def sampled(**changes: Any) -> Any:
        arrays = {"prompt_embeds": rows["embeddings"], "prompt_mask": rows["mask"]}
        if plan.row.null_weak:
            arrays |= {"negative_embeds": negative["embeddings"], "negative_mask": negative["mask"]}
        return pipe(seeds=SEEDS, steps=STEPS, **{**arrays, **changes})

    base = sampled()
    np.testing.assert_array_equal(base, pipe.sample(three, SEEDS, steps=STEPS))
    other = sampled(prompt_embeds=rows["embeddings"][[1, 1, 2]], prompt_mask=rows["mask"][[1, 1, 2]])
    assert distance(other[:1], base[:1]) > 1e-3
    np.testing.assert_array_equal(other[1:], base[1:])
    assert distance(sampled(prompt_mask=np.ones_like(rows["mask"])), base) > 1e-3
    if plan.row.null_weak:
        changed = sampled(negative_embeds=negative["embeddings"] + 1)
        assert all(distance(changed[k : k + 1], base[k : k + 1]) > 1e-3 for k in range(3))


def test_sample_of_one_prompt_serves_all_images(pipe: Pipeline, three: Conditions) -> None:
    rows, negative = three.of(np.array([0])).rows(weak=False), three.of(np.array([0])).rows(weak=True)
    given = {"prompt_embeds": rows["embeddings"], "prompt_mask": rows["mask"]}
    given |= {"negative_embeds": negative["embeddings"], "negative_mask": negative["mask"]}
    found = pipe(seeds=SEEDS, steps=STEPS, **given)
    same = pipe.sample(three.of(np.array([0, 0, 0])), SEEDS, steps=STEPS)
    np.testing.assert_array_equal(found, same)
    assert distance(found[1:2], found[:1]) > 1e-2  # other seeds


def test_padding_does_not_change_a_sample(pipe: Pipeline, three: Conditions) -> None:
    """The embeddings of padded tokens are never seen."""
    columns = {name: values.copy() for name, values in three.columns.items()}
    columns["embeddings"][columns["mask"] == 0] = 7.0
    assert (columns["mask"] == 0).any()
    found = pipe.sample(Conditions(columns, three.strong, three.weak), SEEDS, steps=STEPS)
    np.testing.assert_array_equal(found, pipe.sample(three, SEEDS, steps=STEPS))


@pytest.mark.parametrize("chunk", [1, 2])
def test_sample_in_chunks_runs_each_prompt_once(pipe: Pipeline, three: Conditions, chunk: int) -> None:
    whole = pipe.sample(three, SEEDS, steps=STEPS)
    parts = Pipeline.load(pipe.bundle, batch=2, chunk=chunk)
    ran: list[str] = []
    bind = parts.backend.lane().__class__.bind

    def counted(lane: Any, graph: Any, *arrays: Any, **settings: Any) -> Any:
        call = bind(lane, graph, *arrays, **settings)
        return lambda: (ran.append(graph.kind), call())[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.backend.lane().__class__, "bind", counted)
        np.testing.assert_array_equal(parts.sample(three, SEEDS, steps=STEPS), whole)
    prompts = 3 + 2 * pipe.bundle.manifest.guidance.row.null_weak  # a negative prompt in both engine runs
    padded = 0  # the last image pads its engine run, with the same prompt
    assert ran.count("prompt") == prompts + padded


def test_modulations_are_shared_by_branches_with_other_text(pipe: Pipeline, three: Conditions) -> None:
    run = pipe.prepare([1.0, 0.5], three, SEEDS)
    strong, weak = (branch.held for branch in run.branches)
    separate = {name for name in strong if strong[name] is not weak[name]}
    texts = {"text_keys", "text_values", "text_bias"}
    assert separate == (texts if run.guidance.row.null_weak else set())
    assert strong["modulations"].values.shape[:2] == (2, 1)
    assert strong["text_keys"].values.shape[0] == 1
    (launch,) = launches(pipe.bundle.manifest, run, 0, 0.0, 1.0, 0.0)
    assert launch.inputs["modulations"].branch == 0


def test_guided_and_branches_agree(pipe: Pipeline, three: Conditions) -> None:
    run, x = pipe.prepare_once(0.6, three, seeds=SEEDS), pipe.initial_noise(SEEDS)
    strong, weak = pipe.branches(x, run)
    assert distance(pipe.guided(x, run), weak + np.float32(run.scales[0]) * (strong - weak)) < 1e-5


@pytest.mark.parametrize("rule", ["fresh", "fixed"])
def test_subset_rule_decides_how_often_tokens_are_drawn(
    pipe: Pipeline, loaded: LoadedModel, three: Conditions, rule: Any
) -> None:
    plan = pipe.guidance(strong_sparsity=0.25, subset=rule)
    run = pipe.prepare([1.0, 0.7, 0.4], three, SEEDS, guidance=plan)
    first, *others = run.strong.keep
    assert [np.array_equal(first, other) for other in others] == [rule == "fixed"] * 2
    found = pipe.sample(three, SEEDS, steps=STEPS, guidance=plan)
    assert distance(found, expected_of(loaded, pipe, three, plan)) < CLOSE


def test_default_subset_rule_is_upstreams(pipe: Pipeline) -> None:
    assert pipe.bundle.manifest.guidance.subset == "fixed"


def test_sample_with_a_negative_prompt_missing_says_what_to_give(pipe: Pipeline, three: Conditions) -> None:
    alone = Conditions(three.columns, three.strong, None)
    if not pipe.bundle.manifest.guidance.row.null_weak:
        np.testing.assert_array_equal(pipe.sample(alone, SEEDS, steps=1), pipe.sample(three, SEEDS, steps=1))
        return
    with pytest.raises(UsageError, match=r"cfg.* guidance: expected a negative prompt .*: give negative_embeds"):
        pipe.sample(alone, SEEDS, steps=1)


def test_call_with_classes_and_prompts_is_refused(pipe: Pipeline, three: Conditions) -> None:
    with pytest.raises(
        UsageError, match="expected one of classes, prompts, prompt_embeds, found classes and prompt_embeds"
    ):
        pipe([0], [0], prompt_embeds=three.columns["embeddings"])
    with pytest.raises(UsageError, match="classes: expected none: the model is conditioned on text"):
        pipe([0], [0])
    with pytest.raises(UsageError, match="classes: expected none: the model is conditioned on text"):
        pipe(seeds=[0])


def test_warmup_then_sample_gives_the_same(pipe: Pipeline, three: Conditions) -> None:
    other = Pipeline.load(pipe.bundle, batch=2)
    other.warmup(2, steps=STEPS)
    np.testing.assert_array_equal(other.sample(three, SEEDS, steps=STEPS), pipe.sample(three, SEEDS, steps=STEPS))
