"""Reading of checkpoints: file formats, layouts, wrapper prefixes, and facts besides tensors."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sg_export import checkpoint
from sg_export.checkpoint import CheckpointFacts, parse_facts, read_checkpoint
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import Route

ONE = {"layer.weight": torch.tensor([1.0])}
TWO = {"layer.weight": torch.tensor([2.0])}

KEYS = (
    "heads, route, selection_rate, prediction, space, class_names, size, text_tokens, channels, patch, "
    "pixels_per_latent, time_shift, noise_scale, training"
)
"""Known keys of facts after the family."""


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
    with pytest.raises(UsageError, match=f"expected {weights} weights, found {other}: give `weights` {other}"):
        read_checkpoint(path, weights)


def test_read_checkpoint_of_bare_set_refuses_a_choice(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", ONE)
    with pytest.raises(UsageError, match="a single bare state dict: leave out `weights` ema"):
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


def named(prefix: str, value: float = 1) -> dict[str, Tensor]:
    """Return two tensors, as a state dict has several, under a prefix."""
    return {f"{prefix}layer.weight": torch.tensor([value]), f"{prefix}pos_embed": torch.zeros(1)}


BOOKS = {"initted": torch.tensor(True), "step": torch.tensor(7)}


@pytest.mark.parametrize(
    ("content", "taken", "prefix"),
    [
        ({"blocks.0._checkpoint_wrapped_module.layer.weight": torch.ones(1)}, "bare", ""),
        ({"blocks.0._orig_mod.layer.weight": torch.ones(1), "module.b": torch.ones(1)}, "bare", "module."),
        (named("_fsdp_wrapped_module."), "bare", "_fsdp_wrapped_module."),
        (named("dit.backbone._orig_mod."), "bare", ""),
        ({"n_averaged": torch.tensor(3), **named("module.")}, "bare", "module."),
        ({"state_dict": named("net."), "epoch": 1}, "model", ""),
        ({"state_dict": named("model.")}, "model", ""),
        ({"state_dict": named("model.model.")}, "model", "model."),
        ({"state_dict": {**named("model.", 2), **named("ema_model.")}}, "ema", ""),
        ({"model": named("", 2), "ema": {**BOOKS, **named("ema_model."), **named("online_model.", 3)}}, "ema", ""),
        ({"model": named("", 2), "ema": {"decay": 0.9, "shadow": named("")}}, "ema", ""),
        ({"model": named("", 2), "ema_0.9999": named("")}, "ema", ""),
        ({"ema_model": named(""), "step": 4}, "ema", ""),
        ({"state_dict_ema": named(""), "state_dict": named("", 2), "ema_optimizer": named("", 3)}, "ema", ""),
        ({"module": named(""), "global_steps": 3}, "model", ""),
        ({**named("ema."), **named("model.", 2)}, "ema", ""),
        (
            {"ema": named(""), "step": np.int64(5), "loss": np.float32(1), "rng": np.arange(3), "on": np.bool_(1)},
            "ema",
            "",
        ),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_read_checkpoint_of_common_trainers_takes_the_weights(
    content: Any, taken: str, prefix: str, tmp_path: Path
) -> None:
    read = read_checkpoint(save(tmp_path / "last.ckpt", content))
    weight = next(tensor for name, tensor in read.tensors.items() if name.endswith("layer.weight"))
    assert (read.source.weights, read.prefix, float(weight)) == (taken, prefix, 1)
    assert set(read.tensors) <= {"layer.weight", "pos_embed", "blocks.0.layer.weight", "b"}


@pytest.mark.parametrize("name", ["model.pth.tar", "model.bin", "model", "model.PT", "model.onnx"])
def test_read_checkpoint_of_any_suffix_reads_by_content(name: str, tmp_path: Path) -> None:
    assert value(save(tmp_path / name, ONE)) == 1
    save_file(TWO, tmp_path / name)
    assert value(tmp_path / name) == 2


@pytest.mark.parametrize("key", ["generator", "nets.generator", "student", "generator.student"])
def test_read_checkpoint_with_key_takes_the_tensors_under_it(key: str, tmp_path: Path) -> None:
    content: Any = {"step": 3, "model": TWO}
    for word in reversed(key.split(".")):
        content = {word: content if word != key.split(".")[-1] else {"layer.weight": torch.ones(1)}, "other": TWO}
    path = save(tmp_path / "model.pt", content)
    assert value(path, key) == 1
    assert read_checkpoint(path, key).source.weights == key
    save_file({f"{key}.layer.weight": torch.ones(1), "other.layer.weight": torch.zeros(1)}, path)
    assert value(path, key) == 1


def test_read_checkpoint_with_key_in_the_default_set_takes_the_tensors_under_it(tmp_path: Path) -> None:
    path = save(tmp_path / "model.ckpt", {"state_dict": {**named("net."), "loss.weight": torch.zeros(2)}})
    assert value(path, "net") == value(path, "state_dict.net") == 1


def test_read_checkpoint_with_unknown_key_names_the_others(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", {"generator": ONE, "critic": TWO, "step": 3})
    with pytest.raises(UsageError, match="expected tensors under gen, found them under generator, critic: give one of"):
        read_checkpoint(path, "gen")


@pytest.mark.parametrize("average", [{"decay": 0.999, "shadow_params": [torch.ones(1)]}, [torch.ones(1)]])
def test_read_checkpoint_of_nameless_average_says_what_helps(average: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", {"model": ONE, "ema": average})
    with pytest.raises(UsageError, match=r"ema: expected tensors by their names, found a list: .*give `weights` model"):
        read_checkpoint(path)
    assert value(path, "model") == 1


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Return the index of two shards."""
    shards = {f"model-0000{n}-of-00002.safetensors": {f"{n}.weight": torch.tensor([float(n)])} for n in (1, 2)}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    names = {key: name for name, tensors in shards.items() for key in tensors}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": names}))
    return path


def test_read_checkpoint_of_index_joins_the_shards(index: Path) -> None:
    index.with_name("model.json").write_text('{"route": "1-2"}')
    read = read_checkpoint(index)
    assert {name: float(tensor) for name, tensor in read.tensors.items()} == {"1.weight": 1, "2.weight": 2}
    files = [index, *sorted(index.parent.glob("*.safetensors"))]
    assert read.source.sha256 == hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()
    assert read.facts.route == "1-2"


def test_read_checkpoint_of_shards_without_their_index_names_it(index: Path) -> None:
    first, second = sorted(index.parent.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="one of 2 shards: give the index that lists them"):
        read_checkpoint(first)
    with pytest.raises(CheckpointError, match=f"found a folder: give the index in it, {index}$"):
        read_checkpoint(index.parent)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"expected its shards in the same folder, found no {second.name}"):
        read_checkpoint(index)


CHANGED = "changed while it was read: wait until it is complete, or give a copy of it"
BIG = {"layer.weight": torch.zeros(100_000)}


def meanwhile(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], before: str) -> None:
    """Do `work` right before a function of the reader is called."""
    function = getattr(checkpoint, before)

    def late(*arguments: Any) -> Any:
        work()
        return function(*arguments)

    monkeypatch.setattr(checkpoint, before, late)


def mapped_memory() -> int:
    """Return the bytes of files that are mapped into this process and in its memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_read_holds_one_tensor_of_the_file_at_a_time_in_memory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, path = 16 << 20, tmp_path / f"large.{suffix}"
    state = {f"layers.{index}.weight": torch.full((size // 4,), float(index)) for index in range(6)}
    (torch.save if suffix == "pt" else save_file)(state, path)
    seen, original = list[int](), checkpoint._copy

    def watched(mapped: torch.UntypedStorage) -> torch.UntypedStorage:
        own = original(mapped)
        seen.append(mapped_memory())
        return own

    monkeypatch.setattr(checkpoint, "_copy", watched)
    found = read_checkpoint(path).tensors
    assert len(seen) == len(state)
    assert max(seen) - min(seen) < size
    assert all(map(torch.equal, [found[name] for name in sorted(found)], state.values()))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".legacy"])
@pytest.mark.parametrize("before", ["_read", "_in_memory"])
@pytest.mark.parametrize("change", ["rewritten", "cut", "damaged", "replaced"])
def test_read_checkpoint_that_changes_meanwhile_raises(
    change: str, before: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / f"model{suffix}", tmp_path / "other"
    for file, state in ((path, BIG), (other, {"layer.weight": torch.ones(100_000)})):
        if suffix == ".safetensors":
            save_file(state, file)
        else:
            torch.save(state, file, _use_new_zipfile_serialization=suffix == ".pt")
    work: dict[str, Callable[[], object]] = {
        "rewritten": lambda: path.write_bytes(other.read_bytes()),
        "cut": lambda: os.truncate(path, 100),
        "damaged": lambda: path.write_bytes(b"\xff" * path.stat().st_size),
        "replaced": lambda: other.replace(path),
    }
    meanwhile(monkeypatch, work[change], before)
    with pytest.raises(CheckpointError, match=f"^{path}: {CHANGED}$"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".legacy"])
def test_read_checkpoint_that_changes_later_keeps_its_values(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(BIG, path)
    else:
        torch.save(BIG, path, _use_new_zipfile_serialization=suffix == ".pt")
    read = read_checkpoint(path)
    size = path.stat().st_size
    path.write_bytes(b"\1" * size)
    assert not read.tensors["layer.weight"].any()
    path.write_bytes(b"")
    assert not read.tensors["layer.weight"].any()


def test_read_checkpoint_of_shared_storage_keeps_each_view(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a.t": whole.T, "a.row": whole[1], "a.one": torch.ones(()).expand(5, 5), "a.none": torch.zeros(0, 3)}
    tensors = read_checkpoint(save(tmp_path / "model.pt", state)).tensors
    assert all(torch.equal(tensors[name.removeprefix("a.")], tensor) for name, tensor in state.items())
    assert tensors["t"].untyped_storage().data_ptr() == tensors["row"].untyped_storage().data_ptr()


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


def test_read_checkpoint_leaves_the_json_of_another_tool_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(ONE, tmp_path / "model.safetensors", {"sg_export": json.dumps({"route": "1-6"})})
    (tmp_path / "model.json").write_text(json.dumps({"description": "mine", "sd version": "other"}))
    assert read_checkpoint(tmp_path / "model.safetensors").facts == CheckpointFacts(route="1-6")
    assert caplog.messages == [
        f"{tmp_path}/model.json: not read as facts about model.safetensors, which has its name: expected family, "
        f"{KEYS}, found description, sd version"
    ]


@pytest.mark.parametrize("dash", "-–—−‐‑")
def test_read_checkpoint_reads_facts_as_editors_write_them(dash: str, tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "model.pt")
    text = json.dumps({"route": f"2{dash}3"}, ensure_ascii=False)
    (tmp_path / "model.json").write_text(text, encoding="utf-8-sig")  # with a byte order mark
    assert Route.parse(str(read_checkpoint(tmp_path / "model.pt").facts.route)) == Route(2, 3)


def test_read_checkpoint_of_an_index_with_a_byte_order_mark_joins_the_shards(index: Path) -> None:
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert read_checkpoint(index).tensors.keys() == {"1.weight", "2.weight"}


def test_parse_facts_takes_whole_numbers_for_rates() -> None:
    assert parse_facts('{"selection_rate": 0}', "here").selection_rate == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rout": "1-6"}', "rout: Unexpected keyword argument"),
        ('{"heads": "2"}', "heads: Input should be a valid integer"),
        ('{"heads": 2.5}', "heads: Input should be a valid integer"),
        ('{"route": [1, 6]}', "route: Input should be a valid string"),
        ('{"prediction": "eps"}', "prediction: Input should be 'flow', 'edm' or 'x0'"),
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
    assert str(caught.value).endswith(f"; the known keys are family, {KEYS}")
