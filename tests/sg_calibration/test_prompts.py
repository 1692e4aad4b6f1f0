"""Prompts of calibration, search and gates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sg_calibration.feeds import images_of, split_of
from sg_calibration.prompts import DEFAULT, Prompts, read_prompts
from sg_runtime.errors import CalibrationError


def encode(texts: Sequence[str]) -> tuple[Any, Any]:
    """Return embeddings whose values are the length of the text."""
    return np.array([[[len(text)]] for text in texts], np.float32), np.ones((len(texts), 1), np.int64)


def test_splits_share_no_prompt() -> None:
    prompts = Prompts(read_prompts(None), encode)
    found = [set(split_of(split, prompts, 100).texts) for split in ("calibration", "search", "gate")]
    assert sum(map(len, found)) == len(set().union(*found)) == len(prompts.texts)
    assert min(map(len, found)) >= 8, "as many as the gates judge"


def test_images_have_the_prompts_in_turn_and_no_prompt_in_the_weak_branch() -> None:
    prompts = Prompts(("a", "bb", "ccc"), encode)
    conditions, seeds = images_of("gate", None, 5, prompts=prompts)  # type: ignore[arg-type]  # not read
    assert conditions.rows(weak=False)["embeddings"].ravel().tolist() == [1, 2, 3, 1, 2]
    assert conditions.rows(weak=True)["embeddings"].ravel().tolist() == [0] * 5
    assert len(set(seeds)) == 5


def test_read_prompts_leaves_out_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat \n\n  \nzwei Hunde\n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "zwei Hunde")
    assert len(read_prompts(None)) == len(DEFAULT.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "expected a prompt in each line"), (b"\xff\xfe\x00", "expected a text file")]
)
def test_read_prompts_of_another_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_prompts(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
