"""The training of `scenes`: its parts, and a short run that is interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from examples import train_scenes
from examples.train_scenes import (
    CONFIG,
    ROUTE,
    TEXT_TOKENS,
    learning_rate_factor,
    make_tokenizer,
    plain_attention,
    saved_state,
    tokenize,
    train,
    train_autoencoder,
)
from sg_export.checkpoint import read_checkpoint
from sg_export.loading import load_model

CPU = torch.device("cpu")


def test_tokenizer_pads_on_the_left_and_knows_the_words() -> None:
    ids, mask = tokenize(make_tokenizer(), ["a fox, an apple", "a tram", ""], CPU)
    assert ids.shape == mask.shape == (3, TEXT_TOKENS)
    assert mask.sum(dim=1).tolist() == [6, 3, 1]
    unknown = make_tokenizer().unk_token_id
    assert [unknown in row for row in ids.tolist()] == [False, True, False]
    assert (mask[:, -1] == 1).all()


def test_plain_attention_equals_that_of_pytorch() -> None:
    query, key, value = (torch.randn(2, 3, tokens, 8) for tokens in (4, 6, 6))
    bias = torch.zeros(2, 1, 1, 6)
    bias[0, ..., :2] = -1e4
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(plain_attention(query, key, value, attn_mask=bias), wanted)


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 2000, 1500) for step in (0, 299, 1000, 1500, 1750, 2000)]
    assert factors == pytest.approx([1 / 300, 1, 1, 1, 0.525, 0.05])


def make_short(patched: pytest.MonkeyPatch) -> None:
    """Give the training small sizes."""
    sizes = {"POOL": 32, "BATCH": 4, "EARLY": 3, "SAVED": 1, "HELD_OUT_SCENES": 8, "AUTOENCODER_BATCH": 2, "WARMUP": 1}
    for name, value in sizes.items():
        patched.setattr(train_scenes, name, value)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run of four steps that stopped at the second and went on."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patched:
        make_short(patched)
        autoencoder = train_autoencoder(folder, {"autoencoder": 1, "decoder": 1}, 0, CPU)
        _stop_after(2, patched, autoencoder, folder)
        train(folder, autoencoder, 4, 0, CPU, bf16=False)
        train(folder / "whole", autoencoder, 4, 0, CPU, bf16=False)
    return folder


def _stop_after(step: int, patched: pytest.MonkeyPatch, autoencoder: Any, folder: Path) -> None:
    """Run until the state of a step is saved, as a run that is killed there."""
    save = train_scenes.save_state

    def stop(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if state["step"] == step:
            raise KeyboardInterrupt

    with patched.context() as inner:
        inner.setattr(train_scenes, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder, autoencoder, 4, 0, CPU, bf16=False)


@pytest.mark.slow
def test_interrupted_run_gives_the_weights_of_a_whole_one(short: Path) -> None:
    for name in ("scenes", "scenes-early.safetensors"):
        resumed, whole = (read_checkpoint(folder / name).tensors for folder in (short, short / "whole"))
        for key in whole:
            torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=2e-4, msg=key)
    curves = [json.loads((folder / "curve.json").read_bytes()) for folder in (short, short / "whole")]
    assert [point["step"] for point in curves[0]] == [1, 2, 3, 4]
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
def test_results_are_checkpoints_of_one_shape(short: Path) -> None:
    main, early = (load_model(short / name) for name in ("scenes", "scenes-early.safetensors"))
    assert main.facts.route == early.facts.route == ROUTE
    assert main.facts.conditions == early.facts.conditions
    assert (main.facts.latent, main.facts.tokens) == (early.facts.latent, early.facts.tokens)
    assert main.facts.tokens == CONFIG.tokens
    text = [read_checkpoint(short / name).facts.training for name in ("scenes", "scenes-early.safetensors")]
    assert [one and one["steps"] for one in text] == [4, 3]


@pytest.mark.slow
def test_longer_run_goes_on_before_the_rate_fell(short: Path) -> None:
    found = {steps: saved_state(short, steps, 0, CPU) for steps in (4, 5, 8)}
    assert {steps: state and state["step"] for steps, state in found.items()} == {4: 4, 5: 3, 8: 3}
    assert saved_state(short / "nowhere", 4, 0, CPU) is None


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "seed"), [(8, 1), (3, 0)])
def test_run_that_no_state_fits_is_refused(short: Path, steps: int, seed: int) -> None:
    with pytest.raises(SystemExit, match=r"found seed 0, 4 of 4 steps and seed 0, 3 of 4 steps; give that seed and"):
        saved_state(short, steps, seed, CPU)


@pytest.mark.slow
def test_run_from_a_result_goes_on_from_its_weights(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_short(monkeypatch)
    initial = short / "scenes"
    autoencoder = train_autoencoder(tmp_path, {"autoencoder": 1, "decoder": 1}, 0, CPU, initial)
    train(tmp_path, autoencoder, 5, 0, CPU, bf16=True, initial=initial)
    training = read_checkpoint(tmp_path / "scenes").facts.training
    assert training
    assert training["steps"] == 5
    first, second = (read_checkpoint(folder).tensors for folder in (initial, tmp_path / "scenes"))
    assert all((first[name] - second[name]).abs().max() < 0.01 for name in first)
    assert any((first[name] != second[name]).any() for name in first)
    text = [folder / "text_encoder" / "model.safetensors" for folder in (initial, tmp_path / "scenes")]
    assert text[0].read_bytes() == text[1].read_bytes()
    (point,) = json.loads((tmp_path / "curve.json").read_bytes())
    assert point["step"] == 5
