"""Whole pictures of a text-to-image bundle, against diffusers' own pipeline."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_pipelines import FULL, TOKENS
from numpy.typing import NDArray

from sg_export.checkpoint import Overrides
from sg_export.compiler import compile
from sg_export.options.compile import CompileOptions
from sg_runtime.bundle import Bundle
from sg_runtime.errors import DeviceMemoryError, UsageError
from sg_runtime.manifest import Part, Route
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.encode import CACHED

PROMPTS = ("a cat on a mat", "The QUICK brown fox!! http://fox.com", "dog")
STEPS = 4


@pytest.fixture(scope="module")
def bundle(full_bundle: Path) -> Bundle:
    return Bundle.open(full_bundle)


@pytest.fixture
def pipe(bundle: Bundle) -> Pipeline:
    return Pipeline.load(bundle)


@pytest.fixture(scope="module")
def upstream(full_pipeline: Path) -> Any:
    from diffusers import PRXPipeline

    made = PRXPipeline.from_pretrained(full_pipeline)
    made.set_progress_bar_config(disable=True)
    return made


def pictures(pipe: Pipeline, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return pictures (B, H, W, 3) in [0, 1] of latents."""
    (images,) = pipe.run_part("decode", {"latents": x})
    return np.clip(images.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("mode", "scale", "negative"), [("none", 1.0, None), ("cfg", 3.0, None), ("cfg", 2.0, "blurry")]
)
def test_picture_equals_that_of_diffusers(
    pipe: Pipeline, upstream: Any, prompt: str, mode: Any, scale: float, negative: str | None
) -> None:
    """From equal noise and the same times; without a negative prompt CFG has the empty one."""
    noise = pipe.initial_noise([5])
    guidance = pipe.guidance(mode, scale=scale)
    wanted = upstream(
        prompt,
        negative_prompt=negative or "",
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=torch.from_numpy(noise),
        use_resolution_binning=False,
        output_type="np",
    ).images
    conditions = pipe.from_text([prompt], None if mode == "none" else negative or "")
    x = pipe.sample(conditions, [5], steps=STEPS, guidance=guidance)
    assert wanted.std() > 0.02
    np.testing.assert_allclose(pictures(pipe, x), wanted, atol=1e-4)
    found = pipe(prompts=[prompt], seeds=[5], steps=STEPS, guidance=guidance, negative=negative)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.rint(wanted * 255)).max() <= 1


def test_encode_equals_encode_prompt_of_diffusers(pipe: Pipeline, upstream: Any) -> None:
    embeddings, mask = pipe.encode([*PROMPTS, None])
    wanted, wanted_mask, _, _ = upstream.encode_prompt([*PROMPTS, ""], do_classifier_free_guidance=False)
    np.testing.assert_array_equal(mask, wanted_mask.numpy())
    counted = mask == 1
    np.testing.assert_allclose(embeddings[counted], wanted.detach().numpy()[counted], rtol=1e-4, atol=1e-4)


@pytest.fixture
def runs(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Part, int]]:
    """Record the part and the number of rows of every run of a part."""
    found: list[tuple[Part, int]] = []
    run = pipe._opened.run

    def recorded(part: Part, graph: Any, feeds: Any) -> Any:
        found.append((part, len(next(iter(feeds.values())))))
        return run(part, graph, feeds)

    monkeypatch.setattr(pipe._opened, "run", recorded)
    return found


def test_encode_runs_the_text_encoder_once_for_a_prompt(pipe: Pipeline, runs: list[tuple[Part, int]]) -> None:
    first, _ = pipe.encode(["a cat", "a dog", "a cat"])
    assert runs == [("text", 2)]
    again, _ = pipe.encode(["a dog", "A CAT "])  # cleaning makes it the same text
    assert len(runs) == 1
    np.testing.assert_array_equal(again, first[[1, 0]])
    pipe(prompts=["a cat"] * 2, seeds=[1, 2], steps=1)
    assert runs[1:] == [("text", 1), ("decode", 2)], "the empty prompt alone is new"


def test_encode_forgets_the_oldest_prompts(pipe: Pipeline, runs: list[tuple[Part, int]]) -> None:
    pipe.encode(["a cat"])
    pipe.encode([f"{number} dogs" for number in range(CACHED)])
    pipe.encode(["a cat"])
    assert [rows for _, rows in runs] == [1, CACHED, 1]


@pytest.mark.parametrize("keep", ["step", "one"])
def test_pictures_are_the_same_whatever_stays_open(bundle: Bundle, pipe: Pipeline, keep: Any) -> None:
    other = Pipeline.load(bundle, keep=keep)
    asked: dict[str, Any] = {"prompts": PROMPTS[:2], "seeds": [1, 2], "steps": 2}
    for _ in range(2):
        np.testing.assert_array_equal(other(**asked), pipe(**asked))
        assert not other._opened._parts
        assert bool(other._opened._sizes) == (keep == "step")
    assert pipe._opened._parts.keys() == {"text", "decode"}
    pipe.release()
    assert not pipe._opened._parts


def test_part_that_does_not_fit_says_what_each_needs(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(part: Part) -> Any:
        raise DeviceMemoryError("cuda:0: 100 MB do not fit")

    monkeypatch.setattr(pipe._opened, "_opener", full)
    with pytest.raises(
        DeviceMemoryError, match=r"100 MB do not fit; .*: step \d+ MB, text \d+ MB, decode \d+ MB; .*one"
    ):
        pipe.encode(["a cat"])


def test_prompt_that_is_too_long_is_cut_with_a_warning(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    long = " ".join(["cat"] * 40)
    with caplog.at_level(logging.WARNING):
        embeddings, mask = pipe.encode([long])
    assert embeddings.shape == (1, TOKENS, FULL.context)
    assert mask.all()
    assert "tokens are left out" in caplog.text
    assert f"at most {TOKENS} fit" in caplog.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one text, found none"),
        ({"prompts": [""]}, "prompts: expected words, found '': give None for no prompt"),
        ({"prompts": ["  "]}, "prompts: expected words"),
        ({"prompts": ["###"]}, "prompt '###': expected words, found none after cleaning"),
        ({"prompts": [5]}, "prompts: expected texts, found 5"),
        ({"prompts": {"a": 1}}, "prompts: expected a text, or a sequence of texts"),
        ({"prompts": ["a", "b", "c"]}, "prompts: expected 1 prompt, or 2, one per image, found 3"),
        ({"prompts": ["a"], "negative": ["b", "c", "d"]}, "negative: expected 1 prompt, or 2, one per image, found 3"),
        ({"negative": "b"}, "prompts: expected at least one text, found none"),
        ({"prompts": ["a"], "classes": [1, 2]}, "expected one of classes, prompts, prompt_embeds, found classes and"),
        ({"prompts": ["a"], "prompt_embeds": np.zeros((1, 2, 3))}, "found prompts and prompt_embeds"),
    ],
)
def test_call_with_prompts_that_cannot_be_is_refused(pipe: Pipeline, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(seeds=[1, 2], steps=1, **asked)


def test_one_prompt_as_text_serves_all_images(pipe: Pipeline) -> None:
    asked: Callable[..., Any] = lambda prompts: pipe(prompts=prompts, seeds=[1, 2], steps=1)  # noqa: E731
    np.testing.assert_array_equal(asked("a cat"), asked(["a cat", "a cat"]))


def test_parts_that_are_left_out_leave_embeddings_and_latents(
    full_pipeline: Path, tmp_path: Path, bundle: Bundle
) -> None:
    route = Overrides(route=Route(0, 1))
    alone = compile(
        full_pipeline, CompileOptions(tmp_path / "out", guidance="none", batch=1, overrides=route, parts=("step",))
    )
    assert not alone.manifest.parts
    pipe = Pipeline.load(alone)
    with pytest.raises(
        UsageError, match="prompts: expected a bundle with a text encoder, found none: give prompt_embeds"
    ):
        pipe(prompts=["a"], seeds=[1])
    embeddings, mask = Pipeline.load(bundle).encode(["a cat"])
    x = pipe(prompt_embeds=embeddings, prompt_mask=mask, seeds=[1], steps=1)
    assert x.shape == (1, *alone.manifest.model.latent)
    with pytest.raises(UsageError, match="expected a decoder for the model's latents, found none"):
        pipe.decode(x)


def test_tokenizer_that_is_missing_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    from shutil import copytree

    from sg_runtime.errors import BundleError

    copy = copytree(bundle.path, tmp_path / "copy")
    (copy / "text" / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"text/tokenizer\.json is missing"):
        Bundle.open(copy)
    assert replace(bundle, path=copy).manifest.text is not None
