"""Bundles that are whole by their manifest, but whose graphs do not run: the fault comes out with the graph's name."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.errors import EngineError
from sg_runtime.pipeline import Pipeline

Edit = Callable[[Callable[[Any], object]], None]


def replace_file(bundle: Path, edit: Edit, name: str, content: bytes) -> None:
    """Put other bytes in a file's place and their size and hash into the manifest."""
    (bundle / name).write_bytes(content)
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(lambda manifest: manifest["files"].update({name: facts}))


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x08"], ids=["empty", "text", "half"])
def test_run_of_a_graph_that_is_none_names_it(bundle: Path, edit: Edit, content: bytes) -> None:
    replace_file(bundle, edit, "graphs/condition.onnx", content)
    with pytest.raises(EngineError, match=r"^condition\.onnx: ONNX Runtime .* cannot open it: ") as caught:
        Pipeline.load(bundle)([0], [0], steps=1)
    assert caught.value.exit_code == 4


def test_run_of_weights_that_are_too_short_names_the_graph(bundle: Path, edit: Edit) -> None:
    replace_file(bundle, edit, "graphs/weights.bin", b"\0" * 64)
    with pytest.raises(EngineError, match=r"^condition\.onnx: ONNX Runtime .* cannot open it: "):
        Pipeline.load(bundle)([0], [0], steps=1)


def test_run_of_another_graph_in_its_place_names_it(bundle: Path, edit: Edit) -> None:
    dense = (bundle / "graphs/dense.onnx").read_bytes()
    replace_file(bundle, edit, "graphs/guided-16-8.onnx", dense)
    with pytest.raises(EngineError, match=r"^graphs/guided-16-8\.onnx: ONNX Runtime failed: "):
        Pipeline.load(bundle)([0], [0], steps=1)


@pytest.mark.parametrize(("fact", "value"), [("image_size", 10), ("channels", 3)])
def test_run_of_a_model_of_another_shape_names_the_graph(bundle: Path, edit: Edit, fact: str, value: int) -> None:
    edit(lambda manifest: manifest["model"].update({fact: value}))
    with pytest.raises(EngineError, match=r"^graphs/guided-16-8\.onnx: ONNX Runtime failed: "):
        Pipeline.load(bundle)([0], [0], steps=1)


def test_run_of_an_output_that_is_not_there_names_the_graph(bundle: Path, edit: Edit) -> None:
    edit(lambda manifest: manifest["graphs"][0]["outputs"][0].update(name="none"))
    with pytest.raises(EngineError, match=r"^graphs/condition\.onnx: ONNX Runtime failed: "):
        Pipeline.load(bundle)([0], [0], steps=1)
