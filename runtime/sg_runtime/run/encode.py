"""Prompts to embeddings, by the tokenizer and the text encoder of a bundle."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GraphFacts, Text
from sg_runtime.text import Tokenizer, clean

LOG = logging.getLogger("sg_runtime")

CACHED = 32
"""Number of prompts whose embeddings are kept; 2.4 MB each for 256 tokens of 2304 values."""

Run = Callable[[GraphFacts, Mapping[str, NDArray[Any]]], list[NDArray[Any]]]
"""(graph, inputs with P rows) → outputs with P rows, in order."""

Encoded = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Embeddings (P, L, C) and mask (P, L) of P prompts, as `Pipeline.prompts` takes them."""


class PromptEncoder:
    """The text encoder of a bundle, with the embeddings of the last prompts by their tokens."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizer.

        Raises UsageError if the bundle has no text encoder, MissingExtraError if a library for text
        is not installed, and BundleError if the tokenizer is damaged.
        """
        facts, conditions = bundle.manifest.text, bundle.manifest.model.conditions
        if facts is None or not isinstance(conditions, Text):
            raise UsageError(
                f"{bundle.path}: prompts: expected a bundle with a text encoder, found none: give prompt_embeds, or "
                f"build it with the text encoder, from the folder of its pipeline"
                if isinstance(conditions, Text)
                else f"prompts: expected none: {bundle.manifest.model.family} is conditioned on classes: give classes"
            )
        with bundle.reading(facts.tokenizer):
            self._tokenizer = Tokenizer(bundle.file(facts.tokenizer), conditions.tokens)
        self._facts, self._tokens = facts, conditions.tokens
        self._cache: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[str], run: Run) -> Encoded:
        """Return the embeddings of prompts. An empty text stands for no prompt.

        run: runs the text encoder.

        Warns of prompts that are cut. Raises UsageError if cleaning leaves nothing of a text.
        """
        tokens = self._tokenizer(self.clean(prompts))
        for prompt, cut in zip(prompts, tokens.cut, strict=True):
            if cut:
                LOG.warning("prompt %r: its last %d tokens are left out: at most %d fit", prompt, cut, self._tokens)
        keys = [ids.tobytes() + mask.tobytes() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: row for row, key in enumerate(keys) if key not in known}
        if new:
            rows = list(new.values())
            graph = self._facts.all_graphs[0]
            (embeddings,) = run(graph, {"ids": tokens.ids[rows], "mask": tokens.mask[rows]})
            known |= zip(new, embeddings, strict=True)
        with self._lock:
            for key in keys:
                self._cache[key] = known[key]
                self._cache.move_to_end(key)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return np.stack([known[key] for key in keys]), tokens.mask

    def clean(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts as the tokenizer takes them. An empty text stands for no prompt.

        Raises UsageError if cleaning leaves nothing of a text.
        """
        cleaned = [clean(self._facts.cleaning, prompt) for prompt in prompts]
        for prompt, rest in zip(prompts, cleaned, strict=True):
            if prompt and not rest:
                raise UsageError(f"prompt {prompt!r}: expected words, found none after cleaning: give another prompt")
        return cleaned
