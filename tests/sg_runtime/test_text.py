"""Cleaning of prompts compared with diffusers, and tokenizers compared with transformers.

Both need the extra `diffusers`. What a user sees of a damaged file is tested without it.
"""

import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_made import gemma_like

from sg_runtime.errors import BundleError, MissingExtraError, UsageError
from sg_runtime.manifest import Cleaning
from sg_runtime.text import Tokenizer, clean

MIXED = " Caf\u00c3\u00a9 &amp; “bar” — see https://a.com/x.png "

ODD = (
    MIXED,
    *("", " ", "\n", "\t \r\n", "\x00", "\u2028", "a", "A Cat", "  a  cat  ", "ÄÖÜ İstanbul ſ K"),
    # decoded wrongly, and entities
    *("cafÃ© â€™quotedâ€™", "naÃ¯ve fianc\u00c3\u00a9e", "\ufb01ne \uff21\uff22", "a\u0301 \ud83d", "\ud800 half"),
    *("&lt;b&gt;", "&amp;lt;b&amp;gt;", "&quot;a&quot b", "a &amp b &amp; c", "&#39;x&#x27;", "&eacute;t&eacute;"),
    *("<person> with <person>s", "<b>bold</b>"),
    # addresses
    *("see http://a.com/b?c=d now", "https://www.example.co/x_y/ z", "www:abc", "HTTP://EXAMPLE.ORG", "a.it/b-c/ d"),
    *("me@mail.com", "a@b.net@c", "@nick hello", "@ alone", "x.comy", "a.https://b.com", "10.0.0.255:8080 x"),
    # other scripts, dashes, quotes
    *("一只猫 cat", "㇀㇯ ㊀ ㌀ 㐀 ䷀ 鿿", "カタカナ ひらがな", "a—b–c‐d−e〜f゠g﹣h-i", "-a-b-", "a - b"),
    *("a-b-c-d", "a-b-c-d-e", "this_is_my_cute_cat", "`a´ «b» ¨c¨", "''a''\"\"b\"'", '"quoted"', "'quoted'"),
    *("\"a' b",),
    # codes
    *("a%20b+c", "%C3%A9t%C3%A9 %zz %", "100% 1+1=2", "#1 #12 #123 #1234 #12345 123456 12345", "order 1:23  "),
    *("a\\nb", "photo.png", "my photo.JPG here", "a.b.jpegx.pdf y", ".png", "png images of jpg image", "mp4s"),
    *("jc6640 jc66v 66v22 a1b2c3", "12a34b56", "300x200 3.5х2 4×5 6*7", "v2 4k 35mm f1.8", "٣٣٣٣٣٣ a٣b"),
    # spam and marks
    *("Free shipping worldwide", "worldwide  free shipping!", "free download free", "click for more", "click on"),
    *("page 12 of 3", "a.b,c/d", "wait... what . ok", "a : b :c", "***SALE*** #sale (x) [y] {z} |w|", "½ ¾ ™ © ®"),
    *(":a", ";a;", "+a+", "_a_", ",a,", ".hidden", ".hidden file", "''", '"', "-", "--", "a\n\nb"),
)

PARTS = (
    *("http://", "https:/", "www.", "www:a", "foo.com", "b.ru/x-y/", "a@b.co", "@nick", "&quot;", "&amp;", "&amp"),
    *("&lt;", "&#39;", "&eacute;", "'", '"', "`", "«", "--", "—", "_", "-", ".png", "a.jpg", "png images", "page 3"),
    *("shipping", "free ", "worldwide ", "download", "click on it", "#12", "#12345", "123456", "1.2.3.4", "1:23 "),
    *("\\n", "\n", "\t", " ", "+", "%20", "%C3%A9", "%", "é", "Ã©", "â€™", "漢字", "<person>", "jc6640", "a1b2c3"),
    *("3x4", "3.5х2", "×", ":", ";", ",", "/", "...", "ß", "İ", "½", "\u2028", "\x00", "\ud800", "Z", "1", "12", "٣"),
)


@pytest.fixture(scope="module")
def upstream() -> Any:
    pipelines = pytest.importorskip("diffusers.pipelines.prx.pipeline_prx", reason="needs the extra diffusers")
    return pipelines.TextPreprocessor()


def assert_as(upstream: Any, text: str) -> None:
    assert clean("full", text) == upstream.clean_text(text)
    assert clean("light", text) == upstream.basic_clean(text)
    assert clean("none", text) == text


@pytest.mark.parametrize("text", ODD)
def test_clean_of_an_odd_text_is_upstreams(upstream: Any, text: str) -> None:
    assert_as(upstream, text)


def test_clean_of_each_mark_is_upstreams(upstream: Any) -> None:
    """All of the basic plane that is neither letter nor digit, and the ends of the scripts."""
    marks = [chr(code) for code in range(0x10000) if unicodedata.category(chr(code))[0] in "PSZ"]
    for mark in [*marks, *"\u31bf\u31c0\u31ef\u3200\u33ff\u3400\u4dbf\u4dc0\u4e00\u9fff\ua000"]:
        assert_as(upstream, f"a{mark}{mark} b{mark}c")


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=12).map("".join))
def test_clean_of_any_text_is_upstreams(upstream: Any, text: str) -> None:
    assert_as(upstream, text)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", MIXED),
        ("light", 'Caf\u00e9 & "bar" — see https://a.com/x.png'),
        ("full", 'cafã ; "bar" - see .'),  # in lower case, it is not mended any more
    ],
)
def test_clean_by_each_rule(rule: Cleaning, expected: str) -> None:
    """What upstream returns, for machines without it."""
    assert clean(rule, MIXED) == expected


def test_clean_without_ftfy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingExtraError, match=r"^ftfy is not installed: pip install -e '\.\[text\]'"):
        clean("full", "a cat")
    assert clean("none", "a cat") == "a cat"
    assert get_args(Cleaning) == ("none", "light", "full")


TEXTS = ("", "a cat", "the cat sat on the mat", "hi <eos> x", "\N{CAT FACE} é", " two  spaces ", "a" * 50)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [4, 12])
def test_tokenizer_is_transformers_call(tokens: int, side: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra diffusers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=gemma_like(), pad_token="<pad>", bos_token="<bos>", padding_side=side
    )
    expected = theirs(list(TEXTS), padding="max_length", max_length=tokens, truncation=True, return_tensors="np")
    (tmp_path / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str(), encoding="utf-8")
    found = Tokenizer(tmp_path / "tokenizer.json", tokens)(TEXTS)
    assert (found.ids.dtype, found.mask.dtype) == (np.int64, np.int64)
    np.testing.assert_array_equal(found.ids, expected["input_ids"])
    np.testing.assert_array_equal(found.mask, expected["attention_mask"])
    uncut = theirs(list(TEXTS))["input_ids"]
    assert found.cut == tuple(max(0, len(ids) - tokens) for ids in uncut)
    assert max(found.cut) > 0


def written(path: Path, tokens: int) -> Path:
    made = gemma_like()
    made.enable_padding(length=tokens, pad_id=0, pad_token="<pad>", direction="left")
    made.enable_truncation(max_length=tokens)
    path.write_text(made.to_str(), encoding="utf-8")
    return path


@pytest.mark.parametrize("texts", [(), ("",), ("a", "b")])
def test_tokenizer_of_any_number_of_texts_has_a_row_for_each(texts: Sequence[str], tmp_path: Path) -> None:
    found = Tokenizer(written(tmp_path / "t.json", 5), 5)(texts)
    assert found.ids.shape == found.mask.shape == (len(texts), 5)
    assert found.cut == (0,) * len(texts)


def test_tokenizer_of_half_a_character_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^prompt 'a\\ud800': expected text, found half a character at 1$"):
        Tokenizer(written(tmp_path / "t.json", 5), 5)(["a\ud800"])


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model"', b"\xff\xfe", None], ids=repr)
def test_tokenizer_of_a_damaged_file_says_so(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected a tokenizer, found a damaged file .*build the"):
        Tokenizer(path, 5)


@pytest.mark.parametrize("lacks", ["padding", "truncation"])
def test_tokenizer_of_another_length_says_so(lacks: str, tmp_path: Path) -> None:
    path = written(tmp_path / "t.json", 5)
    with pytest.raises(BundleError, match=r"padding: expected 6 tokens, found 5: build the bundle again"):
        Tokenizer(path, 6)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {lacks: None}), encoding="utf-8")
    with pytest.raises(BundleError, match=rf"{lacks}: expected 5 tokens, found None: build the bundle again"):
        Tokenizer(path, 5)


def test_tokenizer_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "t.json", 5)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"^tokenizers is not installed: pip install -e '\.\[text\]'"):
        Tokenizer(path, 5)
