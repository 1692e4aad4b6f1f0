"""Text encoders and tokenizers of folders that diffusers writes, compared with its own pipeline."""

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_pipelines import CAP, FULL, TOKENS, qwen_encoder, t5gemma_config, text_encoder, tokenizer
from prx_folders import write_json
from torch import nn

from sg_export.parts.text import TOKENIZER_FILES, LoadedText, load_text
from sg_runtime.errors import CheckpointError, MissingExtraError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import Labels, ModelFacts, Text
from sg_runtime.text import Tokenizer, clean

pytestmark = pytest.mark.slow

diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
transformers = pytest.importorskip("transformers", reason="needs the extra diffusers")

PROMPTS = ("", "A cat", "the cat -- sat on the mat, by the sea of tea &amp; the rest")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "prx"))


def with_facts(facts: ModelFacts, **conditions: Any) -> ModelFacts:
    assert isinstance(facts.conditions, Text)
    return replace(facts, conditions=replace(facts.conditions, **conditions))


def edit(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_bytes()) | values)


def embeddings(loaded: LoadedText, prompt: str, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and mask of a prompt, by the runtime's tokenizer."""
    path.write_text(loaded.tokenizer, encoding="utf-8")
    tokens = Tokenizer(path, TOKENS)([clean(loaded.cleaning, prompt)])
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    return loaded.module(ids, mask), mask


def test_load_text_is_the_pipelines_encoding_of_a_prompt(folder: Path, facts: ModelFacts, tmp_path: Path) -> None:
    """The tables in place of masks and rotations change the order of FP32 sums at most."""
    pipeline = diffusers.PRXPipeline.from_pretrained(folder)
    loaded = load_text(folder, facts)
    for prompt in PROMPTS:
        expected, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        found, own = embeddings(loaded, prompt, tmp_path / "tokenizer.json")
        assert found.shape == (1, TOKENS, FULL.context)
        np.testing.assert_array_equal(own.bool(), mask)
        kept, wanted = found[own.bool()], expected[mask]
        assert (kept - wanted).norm() <= 1e-6 * wanted.norm()
    assert (loaded.cleaning, loaded.capped) == ("full", True)
    parameters = [*loaded.module.parameters()]
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in parameters)
    assert not loaded.module.training


def test_load_text_hashes_all_that_is_read(folder: Path, facts: ModelFacts) -> None:
    files = ["model_index.json", "text_encoder/config.json", "tokenizer/tokenizer.json"]
    files += ["tokenizer/tokenizer_config.json", "text_encoder/model.safetensors"]
    source = load_text(folder, facts).source
    assert source.sha256 == sha256_of(*(folder / name for name in files))
    assert (source.file, source.weights) == (folder.name, "bare")


def test_load_text_keeps_the_cap_of_the_scores(folder: Path, copy: Path, facts: ModelFacts, tmp_path: Path) -> None:
    path = copy / "text_encoder" / "config.json"
    whole = json.loads(path.read_bytes())
    assert whole["encoder"]["attn_logit_softcapping"] == CAP
    write_json(path, whole | {"encoder": whole["encoder"] | {"attn_logit_softcapping": None}})
    with_cap, without = load_text(folder, facts), load_text(copy, facts)
    assert (with_cap.capped, without.capped) == (True, False)
    capped, mask = embeddings(with_cap, PROMPTS[2], tmp_path / "tokenizer.json")
    plain, _ = embeddings(without, PROMPTS[2], tmp_path / "tokenizer.json")
    assert (capped - plain)[mask.bool()].norm() > 0.01 * plain[mask.bool()].norm()


@pytest.mark.parametrize("whole", [True, False], ids=["of both halves", "of the encoder"])
def test_load_text_of_either_configuration_is_the_same(
    whole: bool, folder: Path, copy: Path, facts: ModelFacts
) -> None:
    if not whole:
        text_encoder().save_pretrained(copy / "text_encoder")
    found = load_text(copy, facts).module.state_dict()
    assert all(
        torch.equal(tensor, found[name]) for name, tensor in load_text(folder, facts).module.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("variant", "size"), [(None, "4KB"), ("bf16", "4KB"), ("bf16", "1GB")])
def test_load_text_reads_shards_variants_and_types(
    dtype: torch.dtype, variant: str | None, size: str, copy: Path, facts: ModelFacts
) -> None:
    (copy / "text_encoder" / "model.safetensors").unlink()
    saved = text_encoder().to(dtype)
    saved.save_pretrained(copy / "text_encoder", variant=variant, max_shard_size=size)
    assert (len([*(copy / "text_encoder").glob("*.safetensors")]) > 1) == (size == "4KB")
    loaded = load_text(copy, facts, variant=variant)
    found = loaded.module.text_encoder.state_dict()  # type: ignore[union-attr]  # a module's attribute
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in saved.state_dict().items())
    assert loaded.source.weights == (variant or "bare")


@pytest.mark.parametrize("window", [2, 5, TOKENS - 2])
def test_load_text_of_layers_with_a_window_is_transformers(
    window: int, copy: Path, facts: ModelFacts, tmp_path: Path
) -> None:
    theirs = text_encoder(sliding_window=window)
    theirs.save_pretrained(copy / "text_encoder")
    loaded = load_text(copy, facts)
    for count in (1, 6, TOKENS):
        ids = torch.arange(260, 260 + TOKENS)[None]
        mask = (torch.arange(TOKENS) >= TOKENS - count).long()[None]
        expected, found = theirs(input_ids=ids, attention_mask=mask).last_hidden_state, loaded.module(ids, mask)
        assert (found - expected)[mask.bool()].norm() <= 1e-6 * expected[mask.bool()].norm()


def test_load_text_of_a_pipeline_of_pixels_is_its_encoding(copy: Path, facts: ModelFacts, tmp_path: Path) -> None:
    shutil.rmtree(copy / "text_encoder")
    theirs = qwen_encoder()
    theirs.save_pretrained(copy / "text_encoder")
    entry = ["transformers", "Qwen3VLTextModel"]
    edit(copy / "model_index.json", _class_name="PRXPixelPipeline", text_encoder=entry)
    loaded = load_text(copy, facts)
    assert (loaded.cleaning, loaded.capped) == ("light", False)
    for prompt in PROMPTS:
        found, mask = embeddings(loaded, prompt, tmp_path / "tokenizer.json")
        ids = tokenizer()(clean("light", prompt), padding="max_length", max_length=TOKENS, truncation=True)["input_ids"]
        expected = theirs(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state
        assert (found - expected)[mask.bool()].norm() <= 1e-6 * expected[mask.bool()].norm()


def test_load_text_takes_a_stated_cleaning(folder: Path, facts: ModelFacts) -> None:
    assert load_text(folder, facts, "none").cleaning == "none"


def test_load_text_opens_no_connection(folder: Path, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("expected no connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert isinstance(load_text(folder, facts).module, nn.Module)


def refusal(folder: Path, facts: ModelFacts, kind: type[Exception] = CheckpointError, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        load_text(folder, facts, **more)
    return str(caught.value).replace(f"{folder}/", "").replace(f"{folder}", "FOLDER")


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "text_encoder/config.json"])
def test_load_text_without_a_file_names_it(name: str, copy: Path, facts: ModelFacts) -> None:
    (copy / name).unlink()
    assert refusal(copy, facts) == (
        f"FOLDER: expected {name}, found none: fetch the folder again, or save the pipeline again with save_pretrained"
    )


def test_load_text_without_weights_names_them(copy: Path, facts: ModelFacts) -> None:
    (copy / "text_encoder" / "model.safetensors").unlink()
    assert refusal(copy, facts).startswith("text_encoder: expected model.safetensors or its index, found config.json")


def test_load_text_without_a_shard_names_it(copy: Path, facts: ModelFacts) -> None:
    (copy / "text_encoder" / "model.safetensors").unlink()
    text_encoder().save_pretrained(copy / "text_encoder", max_shard_size="4KB")
    shard = sorted((copy / "text_encoder").glob("*.safetensors"))[1]
    shard.unlink()
    assert refusal(copy, facts).endswith(f"expected its shards in the same folder, found no {shard.name}")


def test_load_text_of_another_folder_says_what_it_is(tmp_path: Path, copy: Path, facts: ModelFacts) -> None:
    expected = "FOLDER: expected the folder of a pipeline, with model_index.json, found "
    assert refusal(tmp_path / "none", facts) == expected + "nothing there"
    assert refusal(copy / "transformer", facts).startswith(expected + "a part of a Diffusers pipeline: give its folder")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "_class_name: expected PRXPipeline or PRXPixelPipeline, found FluxPipeline"),
        (
            {"text_encoder": [None, None]},
            "text_encoder: expected its library and class, found [None, None]: give a pipeline that has one",
        ),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder: expected T5GemmaEncoder or Qwen3VLTextModel, found T5EncoderModel: it is not supported",
        ),
        (
            {"tokenizer": ["transformers", "BertJapaneseTokenizer"]},
            "tokenizer: expected a class of transformers that uses the library tokenizers, such as GemmaTokenizerFast, "
            "found BertJapaneseTokenizer: it is not supported",
        ),
        (
            {"tokenizer": ["os", "system"]},
            "tokenizer: expected a class of transformers that uses the library tokenizers, such as GemmaTokenizerFast, "
            "found system: it is not supported",
        ),
    ],
)
def test_load_text_of_an_index_that_names_another_class_says_so(
    entries: dict[str, Any], message: str, copy: Path, facts: ModelFacts
) -> None:
    edit(copy / "model_index.json", **entries)
    assert refusal(copy, facts) == f"model_index.json: {message}"


def test_load_text_of_another_width_names_both(folder: Path, facts: ModelFacts) -> None:
    assert refusal(folder, with_facts(facts, width=20)) == (
        "text_encoder/config.json: hidden_size: expected 20, the width of the text that prx takes, found 16: give the "
        "pipeline that the model was trained with"
    )


def test_load_text_for_a_model_of_classes_says_so(folder: Path, facts: ModelFacts) -> None:
    classes = replace(facts, family="tread", conditions=Labels(3, None), held={"modulations": (4,)})
    expected = "FOLDER: expected a model of prompts, found tread, a model of classes"
    assert refusal(folder, classes, UsageError) == expected


def test_load_text_of_more_tokens_than_embeddings_says_so(copy: Path, facts: ModelFacts) -> None:
    text_encoder(vocab_size=100).save_pretrained(copy / "text_encoder")
    expected = "tokenizer: expected up to 100 tokens, as the text encoder has, found "
    assert refusal(copy, facts).startswith(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 2},
            "text_encoder: expected the tensors of its config.json, found the unknown layers.2.",
        ),
        ({"num_hidden_layers": 4}, "text_encoder: expected the tensors of its config.json, found no layers.3."),
        (
            {"intermediate_size": 20},
            "text_encoder: layers.0.mlp.gate_proj.weight: expected numbers of shape (20, 16), as",
        ),
        ({"num_attention_heads": 3}, "text_encoder/config.json: transformers "),
        ({"hidden_size": "a"}, "text_encoder/config.json: transformers "),
    ],
)
def test_load_text_of_a_configuration_that_does_not_fit_says_so(
    change: dict[str, Any], message: str, copy: Path, facts: ModelFacts
) -> None:
    path = copy / "text_encoder" / "config.json"
    write_json(path, t5gemma_config().to_dict() | {"layer_types": None} | change)
    assert refusal(copy, facts).startswith(message)


@pytest.mark.parametrize("name", TOKENIZER_FILES[:2])
def test_load_text_of_a_damaged_tokenizer_says_so(name: str, copy: Path, facts: ModelFacts) -> None:
    (copy / "tokenizer" / name).write_text('{"model": ', encoding="utf-8")
    found = refusal(copy, facts)
    assert found.startswith("tokenizer: transformers ")
    assert " cannot read it: " in found


def test_load_text_of_no_such_variant_says_so(folder: Path, facts: ModelFacts) -> None:
    expected = "text_encoder: expected weights of the variant fp16, found weights without a variant"
    assert refusal(folder, facts, UsageError, variant="fp16") == expected


def test_load_text_without_transformers_names_the_extra(
    folder: Path, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = "transformers is not installed: pip install -e '.[diffusers]' in a checkout of sg-export"
    assert refusal(folder, facts, MissingExtraError) == expected
