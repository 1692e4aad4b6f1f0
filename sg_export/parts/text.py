"""Text encoders of diffusers' pipelines, with their tokenizers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sg_export.checkpoint import read_part
from sg_export.diffusers_folder import PIPELINE_FILE, PIPELINES, read_config
from sg_export.parts.modules import fill, find_part, refused_by, source_of, without_weights
from sg_export.recognize import what_is
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.extras import require
from sg_runtime.manifest import FLOAT32_MAX, Cleaning, ModelFacts, Source, Text

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What is read of a tokenizer. All but the first may be absent."""

CLEANINGS: Mapping[str, Cleaning] = {"PRXPipeline": "full", "PRXPixelPipeline": "light"}
"""What each pipeline does to a prompt."""


@dataclass(frozen=True, slots=True, eq=False)  # a module is equal to itself alone
class LoadedText:
    """The text encoder of a pipeline, and what comes before it.

    module: computes the embeddings, (1, L, C) float32, of tokens and their mask, both (1, L) int64.
    It is in FP32 and evaluation mode. Embeddings of padding mean nothing: the network masks them.
    tokenizer: content of a file of the library tokenizers, which pads and cuts to L tokens.
    cleaning: what is done to a prompt before its tokens are found.
    source: name of the folder, and hash of all files that were read.
    capped: whether attention caps its scores, which no fused kernel does.
    """

    module: nn.Module
    tokenizer: str
    cleaning: Cleaning
    source: Source
    capped: bool


def load_text(
    folder: Path, model: ModelFacts, cleaning: Cleaning | None = None, variant: str | None = None
) -> LoadedText:
    """Load text encoder and tokenizer from the folder of a pipeline, for texts as `model` takes.

    cleaning: by default that of the pipeline. variant: variant of the weights.

    Raises UsageError for a model without text and for a variant that is not there, CheckpointError
    for a folder that lacks a file or does not fit the model, and MissingExtraError without
    transformers. Nothing is fetched.
    """
    if not isinstance(model.conditions, Text):
        raise UsageError(f"{folder}: expected a model of prompts, found {model.family}, a model of classes")
    library = require("transformers", "diffusers")
    index = _index_of(folder)
    kind = _named(index, folder, "text_encoder", tuple(ENCODERS))
    tokenizer_class = _tokenizer_class(library, index, folder)
    place, tokenizer = folder / "text_encoder", folder / "tokenizer"
    configs = {"pipeline": folder / PIPELINE_FILE, "text_encoder": place / "config.json"}
    for path in (configs["text_encoder"], tokenizer / TOKENIZER_FILE):
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: expected {path.relative_to(folder)}, found none: fetch the folder again, or save the "
                f"pipeline again with save_pretrained"
            )
    configs |= {name: tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
    files = find_part(place, configs, variant, "model")
    with refused_by(library, configs["text_encoder"]):
        made = without_weights(lambda: ENCODERS[kind].made(read_config(configs["text_encoder"])))
    if (width := made.config.hidden_size) != model.conditions.width:
        raise CheckpointError(
            f"{configs['text_encoder']}: hidden_size: expected {model.conditions.width}, the width of the text that "
            f"{model.family} takes, found {width}: give the pipeline that the model was trained with"
        )
    with refused_by(library, tokenizer):
        loaded = tokenizer_class.from_pretrained(tokenizer, local_files_only=True)
        loaded("", padding="max_length", max_length=model.conditions.tokens, truncation=True)  # sets both
    if len(loaded) > made.config.vocab_size:
        raise CheckpointError(
            f"{tokenizer}: expected up to {made.config.vocab_size} tokens, as the text encoder has, found "
            f"{len(loaded)}: fetch the folder again"
        )
    tensors, digest = read_part(files)
    fill(made, tensors, place)
    return LoadedText(
        ENCODERS[kind](made, model.conditions.tokens).eval().requires_grad_(False),
        loaded.backend_tokenizer.to_str(),
        cleaning or CLEANINGS[index["_class_name"]],
        source_of(folder, files, digest),
        getattr(made.config, "attn_logit_softcapping", None) is not None,
    )


class TextEncoder(nn.Module):
    """A text encoder of transformers for L tokens, with eager attention.

    What depends on L alone is a table, so that a graph computes none of it.
    """

    def __init__(self, encoder: nn.Module, tokens: int) -> None:
        super().__init__()
        self.text_encoder: Any = encoder
        self.text_encoder.rotary_emb = _Rotations(encoder, tokens)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden state, (1, L, C), of tokens `ids` (1, L) with their `mask`."""
        padding = (mask[:, None, None].float() - 1.0) * FLOAT32_MAX
        found: Tensor = self.text_encoder(input_ids=ids, attention_mask=self.bias(padding)).last_hidden_state
        return found

    def bias(self, padding: Tensor) -> Any:
        """Return what attention adds to its scores, from its part for padding, (1, 1, 1, L)."""
        raise NotImplementedError

    @staticmethod
    def made(stated: Mapping[str, Any]) -> nn.Module:
        """Return an encoder by its config.json."""
        raise NotImplementedError


class _T5Gemma(TextEncoder):
    """`T5GemmaEncoder`: every token sees every other one, or those in a window around it."""

    window: Tensor | None

    def __init__(self, encoder: nn.Module, tokens: int) -> None:
        super().__init__(encoder, tokens)
        places, width = torch.arange(tokens), self.text_encoder.config.sliding_window
        seen = (places[:, None] - places).abs() <= (tokens if width is None else width)
        self.register_buffer("window", None if seen.all() else _unseen(seen), persistent=False)

    def bias(self, padding: Tensor) -> dict[str, Tensor]:
        near = padding if self.window is None else torch.minimum(padding, self.window)
        return {"full_attention": padding, "sliding_attention": near}

    @staticmethod
    def made(stated: Mapping[str, Any]) -> nn.Module:
        """Published folders have the configuration of encoder and decoder."""
        library = require("transformers.models.t5gemma.modeling_t5gemma", "diffusers")
        if "encoder" in stated:
            config = library.T5GemmaConfig.from_dict(dict(stated)).encoder
        else:
            config = library.T5GemmaModuleConfig.from_dict(dict(stated))
            config.dropout_rate = 0.0  # read by the module, and no field
        return _eager(library.T5GemmaEncoder, config)


class _Qwen3VL(TextEncoder):
    """`Qwen3VLTextModel`: a token sees those before it."""

    window: Tensor

    def __init__(self, encoder: nn.Module, tokens: int) -> None:
        super().__init__(encoder, tokens)
        self.register_buffer("window", _unseen(torch.ones(tokens, tokens).tril() > 0), persistent=False)

    def bias(self, padding: Tensor) -> Tensor:
        return torch.minimum(padding, self.window)

    @staticmethod
    def made(stated: Mapping[str, Any]) -> nn.Module:
        """The configuration of a model with images has that of its text inside."""
        library = require("transformers.models.qwen3_vl.modeling_qwen3_vl", "diffusers")
        config = library.Qwen3VLTextConfig.from_dict(dict(stated.get("text_config", stated)))
        config.use_cache = False
        return _eager(library.Qwen3VLTextModel, config)


ENCODERS: Mapping[str, type[TextEncoder]] = {"T5GemmaEncoder": _T5Gemma, "Qwen3VLTextModel": _Qwen3VL}
"""Supported text encoders, by their class in transformers."""


class _Rotations(nn.Module):
    """The rotations of L positions, as tables in place of a computation."""

    cos: Tensor
    sin: Tensor

    def __init__(self, encoder: Any, tokens: int) -> None:
        super().__init__()
        rotary = type(encoder.rotary_emb)(config=encoder.config)
        cos, sin = rotary(torch.empty(1), torch.arange(tokens)[None])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin


def _unseen(seen: Tensor) -> Tensor:
    """Return the bias of attention that hides what is not `seen`."""
    return torch.where(seen, 0.0, -FLOAT32_MAX)


def _eager(kind: Any, config: Any) -> nn.Module:
    """Return a module of transformers whose attention is not fused, so that it may cap scores."""
    config._attn_implementation = "eager"
    made: nn.Module = kind(config)
    return made


def _index_of(folder: Path) -> Mapping[str, Any]:
    """Return the content of model_index.json of a supported pipeline."""
    path = folder / PIPELINE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: expected the folder of a pipeline, with {PIPELINE_FILE}, found {what_is(str(folder))}"
        )
    index = read_config(path)
    if (found := index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{path}: _class_name: expected {' or '.join(PIPELINES)}, found {found}")
    return index


def _named(index: Mapping[str, Any], folder: Path, part: str, known: tuple[str, ...] | None = None) -> str:
    """Return the class of a part of a pipeline. Raises CheckpointError unless it is `known`."""
    entry, where = index.get(part), f"{folder / PIPELINE_FILE}: {part}"
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise CheckpointError(f"{where}: expected its library and class, found {entry}: give a pipeline that has one")
    if known is not None and entry[1] not in known:
        raise CheckpointError(f"{where}: expected {' or '.join(known)}, found {entry[1]}: it is not supported")
    return entry[1]


def _tokenizer_class(library: Any, index: Mapping[str, Any], folder: Path) -> Any:
    """Return the class of the tokenizer, which must be one of the library tokenizers."""
    name = _named(index, folder, "tokenizer")
    found = getattr(library, name, None)
    fast = isinstance(found, type) and issubclass(found, library.PreTrainedTokenizerFast)
    if found is not library.AutoTokenizer and not fast:
        raise CheckpointError(
            f"{folder / PIPELINE_FILE}: tokenizer: expected a class of transformers that uses the library tokenizers, "
            f"such as GemmaTokenizerFast, found {name}: it is not supported"
        )
    return found
