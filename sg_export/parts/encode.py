"""Prompts to embeddings by the text encoder in PyTorch."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sg_export.parts.text import LoadedText
from sg_runtime.text import Tokenizer, Tokens, clean


def tokenized(loaded: LoadedText, texts: Sequence[str], tokens: int) -> Tokens:
    """Return texts as tokens, cleaned as the pipeline does. tokens: number of tokens of a text."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        path.write_text(loaded.tokenizer, encoding="utf-8")
        return Tokenizer(path, tokens)([clean(loaded.cleaning, text) for text in texts])


def encode(loaded: LoadedText, texts: Sequence[str], tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return embeddings (P, L, C) float32 and mask (P, L) int64 of texts, in FP32."""
    found = tokenized(loaded, texts, tokens)
    with torch.no_grad():
        rows = [
            loaded.module(torch.from_numpy(found.ids[[row]]), torch.from_numpy(found.mask[[row]]))
            for row in range(len(texts))
        ]
    return np.concatenate([row.numpy() for row in rows]), found.mask
