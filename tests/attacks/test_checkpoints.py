"""Checkpoints that are damaged, malicious, or of another model.

Each has one fault and is refused with the reason.
"""

import argparse
import io
import json
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save
from torch import Tensor

from sg_export.cli import main
from sg_export.loading import load_model
from sg_runtime.errors import CheckpointError

STATED = ["--heads", "2", "--prediction", "flow", "--route", "1-1"]


def refusal(path: Path, exit_code: int = 6, stated: list[str] = STATED) -> str:
    """Return the error of `sg-export inspect` for a checkpoint, without the path."""
    result = CliRunner().invoke(main, ["inspect", str(path), *stated])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    message = result.stderr.removeprefix("Error: ").rstrip("\n")
    assert "\n" not in message
    assert path.stem in message
    return message.partition(": ")[2]


@pytest.fixture(scope="module")
def state(tiny: Any) -> dict[str, Tensor]:
    result: dict[str, Tensor] = tiny.state()
    return result


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes bytes as they are, and anything else by torch.save."""

    def write(content: Any, name: str = "model.pt") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return path

    return write


def pickled(content: Any, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


# Files that do not match their name.


def test_checkpoint_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.pt").endswith("(glyphs, glyphs-early, scenes), found nothing there")


def test_checkpoint_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(
        CheckpointError, match=r"model.pt: expected a checkpoint file, or a folder .*, found an empty folder$"
    ):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize(
    "content",
    [b"\0", b"PK\x03\x04", b"\x80\x02", b"\x80\x02.", b"\xff" * 99],
    ids=["zero", "zip magic", "pickle magic", "short pickle", "ones"],
)
def test_checkpoint_of_no_pickle_is_refused(content: bytes, suffix: str, write: Callable[..., Path]) -> None:
    message = refusal(write(content, f"model{suffix}"))
    assert message.startswith(("damaged, or not a PyTorch file (", "refused: it is damaged"))


def test_checkpoint_of_no_safetensors_is_refused(write: Callable[..., Path]) -> None:
    message = refusal(write(b"\xff" * 99, "model.safetensors"))
    assert message.startswith("damaged, or not a safetensors file (")
    assert message.endswith("); copy it again")


def archive(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file: the download failed: fetch it again"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page: the download failed: fetch it again"),
        (b"<html>404 Not Found</html>", "a web page: "),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML message: the download failed"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "a pointer of Git LFS: fetch the file",
        ),
        (b'{"error": "Repository not found"}', "JSON that is no index of shards; if it is a server's message, the dow"),
        (b"[]", "JSON that is no index of shards"),
        (b"Not Found, sorry about that.\n", "a text; if a server wrote it, the download failed"),
        (b"\x1f\x8b\x08" + bytes(99), "an archive: unpack it first"),
        (b"a" + bytes(256) + b"ustar" + bytes(250), "an archive: unpack it first"),
        (b"GGUF" + bytes(99), "a GGUF file"),
        (b"\xef\xbb\xbf<html>404 Not Found</html>", "a web page: "),
        (
            b'\xef\xbb\xbf{"_class_name": "DiTTransformer2DModel"}',
            "the configuration of a Diffusers model, DiTTransformer2DModel: of a PRX give the folder, else ",
        ),
        (b'{"architectures": ["CLIPTextModel"]}', "the configuration of a Transformers model: give a checkpoint of "),
        (b'{"schema_version": 5}', "the manifest of a bundle or another file of sg-export: give the checkpoint itse"),
        (b'{"route": "2-24"}', "facts about a checkpoint: give the checkpoint itself"),
        (archive(weights=b"0", readme=b"1"), "a zip archive of weights, readme"),
    ],
)
def test_checkpoint_that_is_another_file_is_called_by_its_kind(
    content: bytes, found: str, suffix: str, write: Callable[..., Path]
) -> None:
    assert refusal(write(content, f"model{suffix}")).startswith(f"expected a checkpoint, found {found}")


def test_checkpoint_of_torch_under_the_name_of_safetensors_is_refused(write: Callable[..., Path], state: Any) -> None:
    path = write(pickled(state), "model.safetensors")
    assert refusal(path) == "expected safetensors, found a file of torch.save: name it .pt"


# Damage in transit.


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_checkpoint_that_is_truncated_is_refused(
    form: str, share: float, write: Callable[..., Path], state: Any
) -> None:
    whole = save(state) if form == "safetensors" else pickled(state, zipped=form == "zip")
    path = write(whole[: int(len(whole) * share)], f"model.{'safetensors' if form == 'safetensors' else 'pt'}")
    assert refusal(path).startswith(("damaged, or not a ", "refused: it is damaged"))


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_checkpoint_with_one_bit_flipped_ends_with_a_reason(form: str, write: Callable[..., Path]) -> None:
    state = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    whole = save(state) if form == "safetensors" else pickled(state, zipped=form == "zip")
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        # Neither is a model. The test checks that no other error is raised before the refusal.
        with pytest.raises(CheckpointError):
            load_model(write(bytes(damaged), f"model.{'safetensors' if form == 'safetensors' else 'pt'}"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoint_that_the_system_cannot_read_is_refused(suffix: str, tmp_path: Path) -> None:
    # The kind is a regular file, but no process may read its first bytes.
    path = tmp_path / f"model{suffix}"
    path.symlink_to("/proc/self/mem")
    assert refusal(path).startswith("cannot be read (")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[]", b""),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', b"\0" * 8),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', b"\0" * 24),
        (b'{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}', b"\0" * 16),
        (b'{"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}', b"\0" * 16),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}', b"\0" * 16),
    ],
    ids=["empty", "open", "list", "past the end", "left over", "shape", "dtype", "backwards"],
)
def test_checkpoint_with_a_wrong_safetensors_header_is_refused(
    header: bytes, data: bytes, write: Callable[..., Path]
) -> None:
    path = write(safetensors(header, data), "model.safetensors")
    assert refusal(path).startswith("damaged, or not a safetensors file (")


def test_checkpoint_with_a_huge_safetensors_header_is_refused(write: Callable[..., Path]) -> None:
    path = write(struct.pack("<Q", 2**62) + b"{}", "model.safetensors")
    assert refusal(path).startswith("damaged, or not a safetensors file (")


# Code.


class Harm:
    """An object that makes a folder when pickle loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_harm_is_done_by_a_reader_that_is_not_careful(tmp_path: Path) -> None:
    torch.load(io.BytesIO(pickled(Harm(tmp_path / "marker"))), weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("place", ["beside", "inside", "alone", "in options"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoint_with_code_in_it_is_refused_and_runs_none(
    zipped: bool, place: str, write: Callable[..., Path], state: Any, tmp_path: Path
) -> None:
    harm = Harm(tmp_path / "marker")
    content = {
        "beside": {"model_state_dict": state, "more": harm},
        "inside": {**state, "x_embedder.proj.bias": harm},
        "alone": harm,
        "in options": {"ema": state, "args": argparse.Namespace(config=harm)},
    }[place]
    message = refusal(write(pickled(content, zipped=zipped)))
    assert message == (
        "refused: it is damaged, or holds more than tensors and plain values, so that reading it would run its code "
        "(it asks for posix.mkdir); save only its state dict, with torch.save or as safetensors"
    )
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_checkpoint_of_plain_pickle_with_code_is_refused_and_runs_none(
    protocol: int, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(pickle.dumps({"a": Harm(tmp_path / "marker")}, protocol=protocol))
    known = (
        "refused: ",
        "damaged, or not a PyTorch file (",
        "expected a checkpoint, found a text",
    )  # protocol 0 is text
    assert refusal(path).startswith(known)
    assert not (tmp_path / "marker").exists()


def test_checkpoint_with_a_whole_module_in_it_is_refused(write: Callable[..., Path]) -> None:
    assert "(it asks for torch.nn.modules.linear.Linear); save only" in refusal(write(torch.nn.Linear(2, 2)))


# Contents that are not a state dict.


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(2)], "expected a dict of tensors, found list"),
        (torch.zeros(2), "expected a dict of tensors, found Tensor"),
        ("weights", "expected a dict of tensors, found str"),
        ({}, "found nothing"),
        ({"ema": {}}, "found other values: ema"),
        ({"a": "b", "c": [torch.zeros(1)]}, "found other values: a, c"),
        ({"model_state_dict": {"a": 3}}, "found other values: model_state_dict"),
        ({"a": {"b": torch.zeros(1)}}, "found a.b"),
        ({7: torch.zeros(1)}, "found 7"),
        ({f"k{i}": i for i in range(12)}, "found other values: k0, k1, k2, k3, k4, k5, k6, k7 and 4 more"),
        (
            {"a": torch.zeros(1), "module.a": torch.zeros(1)},
            "two tensors are named a without wrappers: give one set by --key",
        ),
    ],
)
def test_checkpoint_of_other_content_is_refused(content: Any, found: str, write: Callable[..., Path]) -> None:
    assert refusal(write(content)).endswith(found)


def test_checkpoint_of_another_family_is_refused(write: Callable[..., Path]) -> None:
    message = refusal(write({"conv_in.weight": torch.zeros(1), "pos_embed": torch.zeros(1)}))
    assert message == (
        "expected a checkpoint of a supported family (maskdit needs decoder_layer.linear.weight; tread needs "
        "x_embedder.proj.weight, t_embedder.mlp.0.weight, y_embedder.embedding_table.weight, "
        "blocks.0.adaLN_modulation.1.weight, final_layer.adaLN_modulation.1.weight; prx needs txt_in.weight, "
        "blocks.0.modulation.lin.weight, final_layer.linear.weight), found conv_in.weight, pos_embed"
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "a transformer in the layout of Diffusers"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a U-Net"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "a U-Net"),
        ("double_blocks.0.img_attn.qkv.weight", "a text-to-image transformer (Flux, SD 3)"),
        ("decoder.up.0.block.0.conv1.weight", "an autoencoder"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "an autoencoder"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text or image encoder"),
        ("blocks.0.attn.qkv.lora_A.weight", "a LoRA"),
        ("blocks.0.attn.qkv.weight.exp_avg", "the state of an optimizer"),
    ],
)
def test_checkpoint_of_a_known_other_network_is_called_so(name: str, found: str, write: Callable[..., Path]) -> None:
    message = refusal(write({name: torch.zeros(1), "pos_embed": torch.zeros(1)}))
    assert message.startswith(f"expected a checkpoint of maskdit, tread or prx, found {found}: ")


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("manifest.json", "a bundle, which a build has made: give the checkpoint"),
        ("zero_to_fp32.py", "a folder of DeepSpeed: turn it into a file with python "),
    ],
)
def test_checkpoint_that_is_a_folder_of_a_tool_is_called_so(file: str, found: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=re.escape(f", found {found}")):
        load_model(tmp_path)


def test_checkpoint_that_is_an_address_is_to_be_downloaded() -> None:
    with pytest.raises(CheckpointError, match=r"found an address: download the file, and give its path$"):
        load_model("https://example.org/latest.pt")


def test_checkpoint_that_names_its_family_but_is_another_is_refused(write: Callable[..., Path], state: Any) -> None:
    path = write({name: tensor for name, tensor in state.items() if name != "pos_embed"})
    path.with_suffix(".json").write_text(json.dumps({"family": "tread"}))
    assert refusal(path) == "pos_embed: expected (1, N, D), found none"


# Tensors that do not fit.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.qkv.bias": None}, "found missing blocks.1.attn.qkv.bias (1)"),
        ({"blocks.0.mlp.fc1.weight": None}, "blocks.0.mlp.fc1.weight: expected (hidden, D), found none"),
        ({"final_layer.linear.weight": None}, "final_layer.linear.weight: expected (rows, D), found none"),
        ({"mask_token": torch.zeros(1)}, "found unknown mask_token (1)"),
        ({"blocks.²": torch.zeros(1)}, "found unknown blocks.² (1)"),
        ({"blocks.two.attn.qkv.bias": torch.zeros(1)}, "found unknown blocks.two.attn.qkv.bias (1)"),
        (
            {"final_layer.linear.bias": None, "final_layer.linear.extra": torch.zeros(1)},
            "found missing final_layer.linear.bias (1); unknown final_layer.linear.extra (1)",
        ),
        (
            {"pos_embed": torch.zeros(1, 16, 31)},
            "pos_embed: expected a float tensor of shape (1, 16, 32), found torch.float32 of shape (1, 16, 31)",
        ),
        ({"pos_embed": torch.zeros(1, 15, 32)}, "pos_embed: expected (1, N, D) with N a square, found N = 15"),
        ({"pos_embed": torch.zeros(16, 32)}, "pos_embed: expected (1, N, D), found (16, 32)"),
        ({"pos_embed": torch.zeros(1, 0, 32)}, "pos_embed: expected (1, N, D), found (1, 0, 32)"),
        (
            {"pos_embed": torch.zeros(1, 16, 32, dtype=torch.int32)},
            "pos_embed: expected a float tensor of shape (1, 16, 32), found torch.int32 of shape (1, 16, 32)",
        ),
        (
            {"pos_embed": torch.zeros(1, 16, 32, dtype=torch.complex64)},
            "pos_embed: expected a float tensor of shape (1, 16, 32), found torch.complex64 of shape (1, 16, 32)",
        ),
        (
            {"blocks.2.attn.proj.bias": torch.zeros(32).to_sparse()},
            "expected a float tensor of shape (32,), found torch.sparse_coo torch.float32 of shape (32,)",
        ),
        ({"x_embedder.proj.weight": torch.zeros(32, 8)}, "expected (D, C, P, P), found (32, 8)"),
        ({"x_embedder.proj.weight": torch.zeros(32, 2, 2, 4)}, "expected square patches, found 2×4"),
        ({"x_embedder.proj.weight": torch.zeros(32, 2, 0, 0)}, "expected (D, C, P, P), found (32, 2, 0, 0)"),
        ({"y_embedder.embedding_table.weight": torch.tensor(1.0)}, "expected (classes + 1, D), found ()"),
        ({"y_embedder.embedding_table.weight": torch.zeros(0, 32)}, "expected (classes + 1, D), found (0, 32)"),
        (
            {"y_embedder.embedding_table.weight": torch.zeros(1, 32)},
            "expected rows for a class and for no class, found one row",
        ),
        ({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, "expected (hidden, D), found ()"),
        ({"final_layer.linear.weight": torch.tensor(1.0)}, "expected (rows, D), found ()"),
        (
            {"final_layer.linear.weight": torch.zeros(16, 32)},
            "expected 8 rows, found 16: a learn_sigma head, as in the published weights of DiT and SiT, which is "
            "not supported; take a checkpoint that was trained with learn_sigma=False",
        ),
        (
            {"pos_embed": torch.full((1, 16, 32), float("nan"))},
            "pos_embed: expected finite values, found NaN or infinity: the training diverged, or the file is damaged; "
            "take an earlier checkpoint",
        ),
        ({"blocks.2.mlp.fc2.bias": torch.full((32,), float("inf"))}, "take an earlier checkpoint"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_checkpoint_with_one_tensor_off_is_refused(
    change: dict[str, Tensor | None], message: str, write: Callable[..., Path], state: Any
) -> None:
    content = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
    assert refusal(write(content)).endswith(message)


def test_checkpoint_with_a_block_of_absurd_number_is_refused(write: Callable[..., Path], state: Any) -> None:
    # If the number were taken as the depth, the network would have a billion blocks.
    message = refusal(write({**state, "blocks.999999999.attn.qkv.bias": torch.zeros(96)}))
    assert "missing blocks.3." in message
    assert message.endswith("unknown blocks.999999999.attn.qkv.bias (1)")


# Variants of MaskDiT.


@pytest.fixture(scope="module")
def masked_state(tiny_masked: Any) -> dict[str, Tensor]:
    """Return tensors of the right shapes that are small in a file: all share one zero."""
    return {name: zeros(*tensor.shape) for name, tensor in tiny_masked.state().items()}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)


NO_DECODER = (
    "y_embedder.embedding_table.weight: expected (classes + 1, 32), found (32, 5), the shape in a MaskDiT; a "
    "MaskDiT without a decoder (decoder_layer.linear.weight) is not supported"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cls_token": zeros(1, 1, 32), "pos_embed": zeros(1, 17, 32)},
            "cls_token: expected none, found one: a class token (pad_cls_token), which is not supported; take a "
            "checkpoint that was trained without it",
        ),
        (
            {"cls_token_embedder.weight": zeros(32, 32)},
            "cls_token_embedder.weight: expected none, found one: conditioning on the class token (pad_cls_token), "
            "which is not supported; take a checkpoint that was trained without it",
        ),
        (
            {"feat_embedder.weight": zeros(32, 7), "feat_embedder.bias": zeros(32)},
            "feat_embedder.weight: expected none, found one: conditioning on external features (ext_feature_dim), "
            "which is not supported; take a checkpoint that was trained without it",
        ),
        (
            {"enc_feat_embedder.weight": zeros(32, 32), "enc_feat_embedder.bias": zeros(32)},
            "enc_feat_embedder.weight: expected none, found one: conditioning on the encoder's output "
            "(use_encoder_feat, self_cond), which is not supported; take a checkpoint that was trained without it",
        ),
        (
            {"final_layer.linear.weight": zeros(16, 512), "final_layer.linear.bias": zeros(16)},
            "final_layer.linear.weight: expected 8 rows, found 16: a learn_sigma head, as in the published weights of "
            "DiT and SiT, which is not supported; take a checkpoint that was trained with learn_sigma=False",
        ),
        (
            {"y_embedder.embedding_table.weight": None},
            "y_embedder.embedding_table.weight: expected (D, classes), found none: a model without classes, which is "
            "not supported; take a checkpoint that was trained with num_classes above 0",
        ),
        (
            {"decoder_layer.linear.weight": zeros(256, 32)},
            "decoder_layer.linear.weight: expected 512 rows, found 256: a decoder width other than upstream's, "
            "which is not supported",
        ),
        ({"decoder_layer.linear.weight": zeros(512)}, "decoder_layer.linear.weight: expected (512, D), found (512,)"),
        ({"decoder_layer.linear.weight": None}, NO_DECODER),
        ({"decoder_pos_embed": None}, "a maskdit model, found missing decoder_pos_embed (1)"),
        ({"decoder_blocks.8.attn.qkv.bias": zeros(3)}, "found unknown decoder_blocks.8.attn.qkv.bias (1)"),
        (
            {"decoder_blocks.7.mlp.fc1.bias": zeros(2048)},
            "decoder_blocks.7.mlp.fc1.bias: expected a float tensor of shape (512,), found torch.float32 of shape "
            "(2048,)",
        ),
        (
            {"mask_token": zeros(1, 1, 32)},
            "mask_token: expected a float tensor of shape (1, 1, 512), found torch.float32 of shape (1, 1, 32)",
        ),
        (
            {"y_embedder.embedding_table.weight": zeros(33, 5)},
            "y_embedder.embedding_table.weight: expected a float tensor of shape (32, 5), found torch.float32 of "
            "shape (33, 5)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_checkpoint_of_maskdit_with_a_variant_or_fault_is_refused(
    change: dict[str, Tensor | None], message: str, write: Callable[..., Path], masked_state: Any
) -> None:
    content = {name: tensor for name, tensor in {**masked_state, **change}.items() if tensor is not None}
    assert refusal(write({"ema": content}), stated=["--heads", "2"]).endswith(message)


def test_checkpoint_of_maskdit_without_decoder_is_refused(write: Callable[..., Path], masked_state: Any) -> None:
    content = {name: tensor for name, tensor in masked_state.items() if not name.startswith(("decoder_", "mask_"))}
    content["final_layer.linear.weight"] = zeros(8, 32)
    content["final_layer.adaLN_modulation.1.weight"] = zeros(64, 32)
    content["final_layer.adaLN_modulation.1.bias"] = zeros(64)
    assert refusal(write({"ema": content})) == NO_DECODER


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"route": "1-2"}, "route 1-2: expected 0-2, the entire encoder: leave out the route"),
        ({"prediction": "flow"}, "prediction flow: expected edm, as in all MaskDiT models: leave out the prediction"),
        ({"heads": None}, "width 32 is not one of upstream's (384, 768, 1024, 1152, 1280): give --heads"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checkpoint_of_maskdit_with_a_fact_that_does_not_fit_is_refused(
    facts: dict[str, Any], message: str, write: Callable[..., Path], masked_state: Any
) -> None:
    path = write({"ema": masked_state})
    path.with_suffix(".json").write_text(json.dumps({"heads": 2, **facts}))
    assert refusal(path, exit_code=2, stated=[]) == message


# Facts.


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"heds": 2}, "heds: Unexpected keyword argument; the known keys are family, heads, route, "),
        ({"heads": 2, "epoch": 5}, "epoch: Unexpected keyword argument; the known keys are family, heads, route, "),
        ({"heads": "2"}, "heads: Input should be a valid integer"),
        ({"family": "unet"}, "family 'unet': expected one of maskdit, tread, prx"),
        ({"class_names": ["a"]}, "class_names: expected 5 names, found 1"),
    ],
)
@pytest.mark.parametrize("place", ["sidecar", "metadata"])
def test_checkpoint_with_a_wrong_fact_is_refused(
    place: str, facts: dict[str, Any], message: str, write: Callable[..., Path], state: Any
) -> None:
    text = json.dumps(facts)
    if place == "sidecar":
        path = write(state)
        path.with_suffix(".json").write_text(text)
    else:
        path = write(save(state, {"sg_export": text}), "model.safetensors")
    refused = refusal(path)
    assert message in refused
    if "keyword" in message:
        beside = "; it was read as facts about model.pt, which has its name: if it is another tool's file, rename it"
        assert refused.endswith(beside) == (place == "sidecar")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"route": "2-1"}, "expected 0 <= start <= end, both blocks included"),
        ({"route": "1-3"}, "route 1-3: expected blocks 0 to 2"),
        ({"route": "most"}, "expected START-END, both blocks included, such as 2-24"),
        ({"route": "0-1,2-2"}, "expected one route, found several, which are not supported"),
        ({"heads": 5}, "heads: expected a divisor of the width 32, found 5"),
        ({"heads": 0}, "heads: expected a divisor of the width 32, found 0"),
        ({"heads": -2}, "heads: expected a divisor of the width 32, found -2"),
    ],
    ids=lambda value: "-".join(f"{key}={fact}" for key, fact in value.items()) if isinstance(value, dict) else "",
)
def test_checkpoint_with_a_fact_that_does_not_fit_is_refused(
    facts: dict[str, Any], message: str, write: Callable[..., Path], state: Any
) -> None:
    path = write(state)
    path.with_suffix(".json").write_text(json.dumps({"heads": 2, "prediction": "flow", **facts}))
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 2
    assert result.stderr.rstrip("\n").endswith(message)


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"", b"{", b"null"], ids=["binary", "empty", "open", "null"])
def test_checkpoint_with_a_sidecar_that_is_no_json_is_refused(
    content: bytes, write: Callable[..., Path], state: Any
) -> None:
    path = write(state)
    path.with_suffix(".json").write_bytes(content)
    assert refusal(path)


def test_checkpoint_with_a_sidecar_that_cannot_be_read_is_refused(write: Callable[..., Path], state: Any) -> None:
    path = write(state)
    path.with_suffix(".json").symlink_to("/proc/self/mem")
    assert refusal(path).startswith("expected checkpoint facts as JSON, cannot read the file (")
