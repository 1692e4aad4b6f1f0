"""Reading of checkpoints: file formats, layouts, wrapper prefixes, and facts besides tensors."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sg_export.checkpoint import CheckpointFacts, parse_facts, read_checkpoint
from sg_runtime.errors import CheckpointError, UsageError

ONE = {"layer.weight": torch.tensor([1.0])}
TWO = {"layer.weight": torch.tensor([2.0])}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def value(path: Path, weights: Any = None) -> float:
    """Return the only value of a checkpoint, which shows the set of weights that was read."""
    return float(read_checkpoint(path, weights).tensors["layer.weight"])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_read_checkpoint_of_each_format_gives_the_tensors(suffix: str, tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(2, dtype=torch.float16)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    read = read_checkpoint(path)
    assert set(read.tensors) == set(state)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in state.items())
    assert read.tensors["b.c"].dtype == torch.float16
    assert read.facts == CheckpointFacts()
    assert read.prefix == ""


def test_read_checkpoint_of_legacy_format_gives_the_tensors(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert value(tmp_path / "model.pt") == 1


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_checkpoint_with_parsed_options_beside_gives_the_tensors(zipped: bool, tmp_path: Path) -> None:
    content = {"ema": ONE, "args": argparse.Namespace(config="a.yaml", seeds=[0, 1], cfg_scale=None)}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert value(tmp_path / "model.pt") == 1
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_read_checkpoint_source_names_file_and_hash(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", {"ema": ONE})
    source = read_checkpoint(str(path)).source
    assert (source.file, source.weights, source.reference) == ("model.pt", "ema", None)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_read_checkpoint_by_reference_name_gives_its_facts() -> None:
    read = read_checkpoint("glyphs")
    assert (read.source.file, read.source.reference, read.source.name) == ("glyphs.safetensors", "glyphs", "glyphs")
    assert (read.facts.family, read.facts.route, read.facts.prediction) == ("tread", "1-6", "flow")
    assert read.facts.class_names is not None
    assert len(read.facts.class_names) == 62


@pytest.mark.parametrize(
    ("layout", "weights", "taken", "found"),
    [
        ({"model_state_dict": ONE, "ema_state_dict": TWO, "optimizer_state_dict": {}, "step": 7}, None, "ema", 2),
        ({"model_state_dict": ONE, "ema_state_dict": TWO, "optimizer_state_dict": {}, "step": 7}, "model", "model", 1),
        ({"model_state_dict": ONE, "ema_state_dict": TWO}, "ema", "ema", 2),
        ({"model_state_dict": ONE, "ema_state_dict": None}, None, "model", 1),
        ({"model_state_dict": ONE}, "model", "model", 1),
        ({"state_dict": ONE, "epoch": 3}, None, "model", 1),
        ({"model": ONE, "ema": TWO}, None, "ema", 2),
        ({"model": ONE, "ema": TWO}, "model", "model", 1),
        ({"ema": TWO}, None, "ema", 2),
        (TWO, None, "bare", 2),
    ],
)
def test_read_checkpoint_of_each_layout_takes_the_wanted_set(
    layout: Any, weights: Any, taken: str, found: float, tmp_path: Path
) -> None:
    path = save(tmp_path / "model.pt", layout)
    assert read_checkpoint(path, weights).source.weights == taken
    assert value(path, weights) == found


@pytest.mark.parametrize(("weights", "other"), [("ema", "model"), ("model", "ema")])
def test_read_checkpoint_without_the_wanted_set_names_the_other(weights: Any, other: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", {f"{other}_state_dict": ONE})
    with pytest.raises(UsageError, match=f"expected {weights} weights, found {other}: give --weights {other}"):
        read_checkpoint(path, weights)


def test_read_checkpoint_of_bare_set_refuses_a_choice(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", ONE)
    with pytest.raises(UsageError, match="a single bare state dict: leave out --weights ema"):
        read_checkpoint(path, "ema")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model._orig_mod.",
        "module.model.",
        "_orig_mod.module.model.",
    ],
)
def test_read_checkpoint_with_wrapper_prefixes_takes_them_off(prefix: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", {"ema": {f"{prefix}{name}": tensor for name, tensor in ONE.items()}})
    read = read_checkpoint(path)
    assert list(read.tensors) == ["layer.weight"]
    assert read.prefix == prefix


def test_read_checkpoint_with_prefix_on_some_names_takes_it_off_those(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {"a": torch.zeros(1), "module.b": torch.zeros(1), "c.model.d": torch.zeros(1)}
    read = read_checkpoint(save(tmp_path / "model.pt", state))
    assert list(read.tensors) == ["a", "b", "c.model.d"]
    assert read.prefix == "module."


def test_read_checkpoint_metadata_gives_facts(tmp_path: Path) -> None:
    facts = {"family": "tread", "heads": 2, "route": "1-6", "prediction": "edm", "class_names": ["a", "b"]}
    save_file(ONE, tmp_path / "model.safetensors", {"sg_export": json.dumps(facts), "format": "pt"})
    read = read_checkpoint(tmp_path / "model.safetensors").facts
    assert read == CheckpointFacts("tread", 2, "1-6", None, "edm", None, ("a", "b"), None)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_read_checkpoint_sidecar_stands_before_metadata(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(ONE, path, {"sg_export": json.dumps({"route": "1-6", "heads": 2})})
    else:
        torch.save(ONE, path)
    path.with_suffix(".json").write_text(json.dumps({"route": "2-3", "training": {"steps": 5, "data": ["a"]}}))
    heads = 2 if suffix == ".safetensors" else None  # the metadata gives facts that the sidecar lacks
    assert read_checkpoint(path).facts == CheckpointFacts(
        route="2-3", heads=heads, training={"steps": 5, "data": ["a"]}
    )


def test_parse_facts_takes_whole_numbers_for_rates() -> None:
    assert parse_facts('{"selection_rate": 0}', "here").selection_rate == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rout": "1-6"}', "rout: Unexpected keyword argument"),
        ('{"heads": "2"}', "heads: Input should be a valid integer"),
        ('{"heads": 2.5}', "heads: Input should be a valid integer"),
        ('{"route": [1, 6]}', "route: Input should be a valid string"),
        ('{"prediction": "eps"}', "prediction: Input should be 'flow' or 'edm'"),
        ('{"space": "rgb"}', "space: Input should be 'pixel' or 'latent'"),
        ('{"class_names": ["a", 1]}', "class_names.1: Input should be a valid string"),
        ("[]", "content: Input should be an object"),
        ("{", "content: Invalid JSON"),
    ],
)
def test_parse_facts_with_one_fault_names_it(text: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_facts(text, "model.json")
    assert str(caught.value).startswith(f"model.json: {message}")
    assert str(caught.value).endswith(
        "; the known keys are family, heads, route, selection_rate, prediction, space, class_names, training"
    )
