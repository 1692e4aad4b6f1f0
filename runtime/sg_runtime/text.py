"""Prompts as tokens: the cleaning of a text, and its tokenizer.

The rules of `clean` are those of DeepFloyd IF (`deepfloyd_if/modules/t5.py`), as the pipelines of
diffusers 0.42.1 apply them (`pipelines/prx/pipeline_prx.py`, `pipeline_prx_pixel.py`). A model has
seen only texts that were cleaned so.
"""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import numpy as np
from numpy.typing import NDArray

from sg_runtime.errors import BundleError, SgError, UsageError
from sg_runtime.extras import require
from sg_runtime.manifest.base import Cleaning

_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_DASHES = (
    "-\N{ARMENIAN HYPHEN}\N{HEBREW PUNCTUATION MAQAF}\N{CANADIAN SYLLABICS HYPHEN}\N{MONGOLIAN TODO SOFT HYPHEN}"
    "\N{HYPHEN}-\N{HORIZONTAL BAR}\N{DOUBLE OBLIQUE HYPHEN}\N{HYPHEN WITH DIAERESIS}\N{TWO-EM DASH}\N{THREE-EM DASH}"
    "\N{DOUBLE HYPHEN}\N{WAVE DASH}\N{WAVY DASH}\N{KATAKANA-HIRAGANA DOUBLE HYPHEN}"
    "\N{PRESENTATION FORM FOR VERTICAL EM DASH}\N{PRESENTATION FORM FOR VERTICAL EN DASH}\N{SMALL EM DASH}"
    "\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}"
)

_Rules = tuple[tuple[str, str], ...]

_ADDRESSES: _Rules = (
    (r"<person>", "person"),  # placeholder of a data set
    (  # start of an address, or the name of a site with its path
        rf"\b(?:(?:https?|www):(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@))",
        "",
    ),
    (r"@\w+", ""),  # nickname
    ("[\N{CJK STROKE T}-\u9fff]+", ""),  # from CJK strokes to unified ideographs
    (f"[{_DASHES}]+", "-"),
    (r"[`´«»¨]", '"'),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # address of a computer
    (r"\d:\d\d\s+$", ""),  # time at the end
    (r"\\n", " "),  # line feed in writing
    (r"#\d{1,3}\b", ""),  # number of an article
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.(?:{_FILES})", ""),  # name of a file
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
"""Rules up to the marks, in order: a pattern and what replaces it. The text is in lower case."""

_JOINED = "[-_]"
"""What joins words in an identifier."""

_MOST_JOINED = 3
"""A text with more of them is an identifier."""

_SPAM: _Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    ("\\b\\d+\\.?\\d*[x\N{CYRILLIC SMALL LETTER HA}×]\\d+\\.?\\d*\\b", ""),  # 300x200
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # a space after a mark
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),  # quotes around the text
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)
"""Rules after the light cleaning."""


def read_prompts(name: str, path: Path, kind: type[SgError] = UsageError) -> tuple[str, ...]:
    """Return the lines of a file that are not blank, without spaces around them.

    name: the file's parameter or option, for the message.

    Raises an error of this kind if the file cannot be read as text or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise kind(f"{name} {path}: expected a text file, found one that cannot be read ({error})") from None
    if not (texts := tuple(line.strip() for line in lines if line.strip())):
        raise kind(f"{name} {path}: expected a prompt in each line, found none")
    return texts


def clean(rule: Cleaning, text: str) -> str:
    """Return a prompt as the model's pipeline gives it to the tokenizer.

    rule: "full" as `TextPreprocessor.clean_text` of diffusers, "light" as its `basic_clean`.

    Raises MissingExtraError if ftfy is not installed; "none" needs none.
    """
    if rule == "none":
        return text
    if rule == "light":
        return _light(text)
    text = _applied(_ADDRESSES, unquote_plus(text).strip().lower())
    if len(re.findall(_JOINED, text)) > _MOST_JOINED:
        text = re.sub(_JOINED, " ", text)
    return _applied(_SPAM, _light(text)).strip()


def _light(text: str) -> str:
    """Mend text that was decoded wrongly, and read HTML's entities, also those of entities."""
    fixed: str = require("ftfy", "text").fix_text(text)
    return html.unescape(html.unescape(fixed)).strip()


def _applied(rules: Iterable[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


@dataclass(frozen=True, slots=True, eq=False)  # an array is equal by element
class Tokens:
    """P texts as L tokens each.

    ids: (P, L) int64, numbers of tokens.
    mask: (P, L) int64, 1 for a token, 0 for padding.
    cut: number of tokens that did not fit, of each text.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    cut: tuple[int, ...]


class Tokenizer:
    """The tokenizer of a bundle. Several threads can use it."""

    def __init__(self, path: Path, tokens: int) -> None:
        """Read a file of the library tokenizers, which pads and cuts to `tokens`.

        Raises BundleError if it is damaged, and MissingExtraError without the library.
        """
        library = require("tokenizers", "text")
        try:
            self._tokenizer: Any = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library's errors share no other base class
            raise BundleError(
                f"{path}: expected a tokenizer, found a damaged file ({error}): build the bundle again"
            ) from None
        for name, key in (("padding", "length"), ("truncation", "max_length")):
            if (found := (getattr(self._tokenizer, name) or {}).get(key)) != tokens:
                raise BundleError(f"{path}: {name}: expected {tokens} tokens, found {found}: build the bundle again")
        self.tokens = tokens

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of cleaned texts. Raises UsageError for a text that has no UTF-8."""
        found = [self._encode(text) for text in texts]
        shape = (len(found), self.tokens)
        return Tokens(
            np.array([one.ids for one in found], np.int64).reshape(shape),
            np.array([one.attention_mask for one in found], np.int64).reshape(shape),
            tuple(sum(part.special_tokens_mask.count(0) for part in one.overflowing) for one in found),
        )

    def _encode(self, text: str) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"prompt {text!r}: expected text, found half a character at {error.start}") from None
        return self._tokenizer.encode(text)
