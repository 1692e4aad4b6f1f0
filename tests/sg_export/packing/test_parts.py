"""Text encoder and decoder as parts of a bundle: which are built, from which folders, and how."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_pipelines import FULL, autoencoder
from prx_folders import state_of, write_pipeline

from sg_calibration.settings import FeedSettings
from sg_export.checkpoint import Overrides
from sg_export.compiler import compile
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_export.options.quantize import QuantizeOptions
from sg_export.parity.verify import verify
from sg_export.parts.encode import encode
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CheckpointError, MissingExtraError, UsageError
from sg_runtime.manifest import OF_TEXT, QualityGates, Route
from sg_runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow

ROUTE = Overrides(route=Route(0, 1))


def options(output: Path, **settings: Any) -> CompileOptions:
    return CompileOptions(output, **{"guidance": "none", "batch": 1, "overrides": ROUTE, **settings})


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an autoencoder of two channels, as the tiny class model has."""
    path = tmp_path_factory.mktemp("vae") / "vae"
    autoencoder(channels=2).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sizes(full_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle of two sizes with all parts."""
    return compile(full_pipeline, options(tmp_path_factory.mktemp("sizes") / "out", sizes=((48, 80),)))


def test_decoder_has_a_graph_for_each_size_and_weights_once(sizes: Bundle) -> None:
    text, decoder = sizes.manifest.text, sizes.manifest.decoder
    assert text is not None
    assert decoder is not None
    assert [graph.name for graph in decoder.all_graphs] == ["64x64-decode", "48x80-decode"]
    assert [graph.outputs[0].shape for graph in decoder.all_graphs] == [(1, 3, 64, 64), (1, 3, 48, 80)]
    assert [graph.name for graph in text.all_graphs] == ["text"]
    names = sorted(path.name for path in sizes.path.rglob("*") if path.suffix in (".bin", ".json"))
    assert names == sorted(
        ["manifest.json", "tokenizer.json", "weights.bin", "weights-decoder.bin", "weights-text-encoder.bin"]
    )
    pipe = Pipeline.load(sizes)
    assert pipe.at(48, 80)(prompts="a cat", seeds=[1], steps=1).shape == (1, 48, 80, 3)
    assert pipe(prompts="a cat", seeds=[1], steps=1).shape == (1, 64, 64, 3)


def test_verify_compares_the_parts_of_every_size(sizes: Bundle, full_pipeline: Path) -> None:
    parity = verify(sizes.path, full_pipeline, times=(0.5,))
    compared = {c.subject: c for c in parity.comparisons if c.time is None and "steps" not in c.subject}
    assert list(compared) == ["text", "64x64-decode", "48x80-decode"]
    assert all(c.passed and 0 < c.relative_l2 < 1e-5 for c in compared.values())


def test_verify_with_another_folder_of_the_parts_is_refused(sizes: Bundle, full_pipeline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    autoencoder(scaling_factor=0.5).save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"from which the part decode of .* was built, found"):
        verify(sizes.path, full_pipeline, vae=other, times=(0.5,))


def test_engines_are_built_of_the_parts_too(full_pipeline: Path, tmp_path: Path) -> None:
    engines = EngineOptions(batch=(1,), compute_capabilities=(89,), allow_unfused=True)  # heads of 8 values
    bundle = compile(full_pipeline, options(tmp_path / "out", batch=None, precision="fp16", engines=engines))
    manifest = bundle.manifest
    assert manifest.text is not None
    assert manifest.decoder is not None
    assert (manifest.text.precision, manifest.decoder.precision) == ("bf16", "fp16")
    for part in manifest.parts.values():
        ((engine,),) = (built.engines for built in part.built)
        (graph,) = part.all_graphs
        assert graph.file is None
        assert graph.parity is not None
        assert (engine.kind, engine.profiles[0].batch) == (graph.kind, 1)
        assert part.engine(graph, 1, "tensorrt_rtx") == (engine, 0)
        assert manifest.files[engine.file].size == bundle.file(engine.file).stat().st_size
    parity = verify(bundle.path, full_pipeline, times=(0.5,), save_polygraphy=tmp_path / "parity")
    commands = [command for command in parity.commands if "text." in command or "decode." in command]
    assert len(commands) == 2
    assert all("--optimization-profile 0" in command for command in commands)


def test_decoder_of_an_autoencoder_makes_pictures_of_a_class_model(
    tiny_checkpoint: Path, vae: Path, tmp_path: Path
) -> None:
    """Latents are the same as without it, and pictures those that diffusers decodes."""
    from diffusers import AutoencoderKL

    bundle = compile(tiny_checkpoint, CompileOptions(tmp_path / "out", guidance="none", batch=2, vae=vae))
    assert list(bundle.manifest.parts) == ["decode"]
    pipe = Pipeline.load(bundle)
    latents = pipe.sample([1, 2], [3, 4], steps=3)
    upstream = AutoencoderKL.from_pretrained(vae)
    scaled = torch.from_numpy(latents) / upstream.config.scaling_factor + upstream.config.shift_factor
    with torch.no_grad():
        wanted = upstream.decode(scaled).sample.numpy()
    (found,) = pipe.run_part("decode", {"latents": latents})
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted).max() > 0.1
    pixels = np.clip(np.rint(wanted.transpose(0, 2, 3, 1) * 127.5 + 127.5), 0, 255)
    assert np.abs(pipe([1, 2], [3, 4], steps=3).astype(int) - pixels).max() <= 1


def test_build_command_names_parts_and_their_folders(sizes: Bundle, tiny_bundle: Path, full_pipeline: Path) -> None:
    manifest = sizes.manifest
    assert "--parts" not in build_command(manifest, "out")
    assert "--text-precision fp32" in build_command(manifest, "out")
    alone = replace(manifest, decoder=None)
    assert "--parts text,step" in build_command(alone, "out")
    assert manifest.text is not None
    other = replace(manifest.text, source=replace(manifest.text.source, file="other"))
    assert f"--pipeline other --text-precision fp32 --vae {full_pipeline.name}" in build_command(
        replace(manifest, text=other), "out"
    )
    assert "--parts" not in build_command(Bundle.open(tiny_bundle).manifest, "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("text",)}, "parts: expected step among them, found text"),
        ({"parts": ("step", "image")}, "parts: expected one of text, step, decode, found 'image'"),
        ({"parts": ("step",), "vae": Path("vae")}, "vae: expected none for a bundle without decode, found one"),
        ({"parts": ("step",), "text_precision": "bf16"}, "text_precision: expected none for a bundle without text"),
        ({"text_precision": "int8"}, "text_precision: expected one of fp32, fp16, bf16, found 'int8'"),
        ({"text_precision": "bf16"}, "text_precision bf16: ONNX Runtime's CPU provider has none"),
    ],
)
def test_options_of_parts_that_cannot_be_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        CompileOptions(tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("part", "option"), [("text", "give `pipeline` FOLDER"), ("decode", "give `vae` or `pipeline` FOLDER")]
)
def test_part_of_a_checkpoint_without_a_folder_is_refused(
    part: Any, option: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    asked = CompileOptions(tmp_path / "out", parts=("step", part))
    with pytest.raises(UsageError, match=f"parts: {part}: expected the folder of a pipeline, found none: {option}"):
        compile(tiny_checkpoint, asked)
    assert not (tmp_path / "out").exists()


def test_text_for_a_model_of_classes_is_refused(tiny_checkpoint: Path, full_pipeline: Path, tmp_path: Path) -> None:
    asked = CompileOptions(tmp_path / "out", parts=("step", "text"), pipeline=full_pipeline)
    with pytest.raises(UsageError, match="parts: text: expected a model of text, found tread, a model of classes"):
        compile(tiny_checkpoint, asked)


def test_part_that_is_asked_for_and_not_in_the_folder_is_refused(tmp_path: Path) -> None:
    """Without `parts`, the same folder gives a bundle of the denoiser alone."""
    path = write_pipeline(tmp_path / "prx", FULL, state_of(FULL), default_sample_size=64)
    with pytest.raises(CheckpointError, match="text_encoder"):
        compile(path, options(tmp_path / "out", parts=("step", "text")))
    with pytest.raises(CheckpointError, match=r"expected vae/config\.json"):
        compile(path, options(tmp_path / "out", parts=("step", "decode")))
    assert not compile(path, options(tmp_path / "out")).manifest.parts


def test_parts_of_another_folder_serve_a_checkpoint_alone(full_pipeline: Path, tmp_path: Path) -> None:
    """As for a checkpoint of Photoroom's training code."""
    facts = Overrides(route=Route(0, 1), size=(64, 64), text_tokens=12)
    asked = options(tmp_path / "out", pipeline=full_pipeline, parts=("step", "text"), overrides=facts)
    bundle = compile(full_pipeline / "transformer", asked)
    assert list(bundle.manifest.parts) == ["text"]
    assert bundle.manifest.text is not None
    assert bundle.manifest.text.source.file == full_pipeline.name


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_parts_without_the_extra_are_refused_with_its_name(
    library: str, full_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingExtraError, match=r"'\.\[diffusers\]' .*; or leave out .*: give `parts` step"):
        compile(full_pipeline, options(tmp_path / "out"))
    assert not compile(full_pipeline, options(tmp_path / "out", parts=("step",))).manifest.parts


def test_quantization_runs_from_prompts_and_verify_judges_on_the_same(
    full_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gates have other prompts than ranges and search. The text encoder stays in FP32."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"{number} cats" for number in range(1, 9)))
    quantize = QuantizeOptions(
        feeds=FeedSettings(1, 25, 0),
        prompts=tmp_path / "prompts.txt",
        gates=QualityGates(0.0, 100.0),
        search_images=1,
        gate_images=2,
    )
    bundle = compile(
        full_pipeline, options(tmp_path / "out", guidance="cfg", parts=("step", "text"), quantize=quantize)
    )
    manifest = bundle.manifest
    assert manifest.quantization is not None
    assert manifest.text is not None
    assert manifest.quantization.prompts == ("4 cats", "8 cats")
    assert manifest.text.precision == "fp32"
    of_text = [layer.name for layer in manifest.quantization.layers if layer.reason == OF_TEXT]
    assert of_text == [f"blocks.{block}.attention.txt_kv_proj" for block in range(2)]
    assert all(layer.quantized for layer in manifest.quantization.layers if layer.name not in of_text)
    assert "--quantize-text" not in build_command(manifest, "out")
    judged: list[Sequence[str]] = []

    def recorded(loaded: Any, texts: Sequence[str], tokens: int) -> Any:
        judged.append(texts)
        return encode(loaded, texts, tokens)

    monkeypatch.setattr("sg_export.parity.verify.encode", recorded)
    assert verify(bundle.path, full_pipeline).passed
    assert judged == [["4 cats", "8 cats", ""]]


def test_prompts_without_a_text_encoder_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    quantize = QuantizeOptions(prompts=tmp_path / "prompts.txt")
    with pytest.raises(UsageError, match=r"`prompts` .*: expected none for a build without a text encoder"):
        compile(tiny_checkpoint, CompileOptions(tmp_path / "out", quantize=quantize))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_engine_of_a_decoder_needs_no_fused_attention(
    precision: Any, tiny_checkpoint: Path, vae: Path, tmp_path: Path
) -> None:
    """Steps need it. A decoder in BF16 is of another opset."""
    engines = EngineOptions(compute_capabilities=(89,))
    asked = CompileOptions(tmp_path / "out", (0.5,), precision=precision, vae=vae, engines=engines)
    decoder = compile(tiny_checkpoint, asked).manifest.decoder
    assert decoder is not None
    ((engine,),) = (built.engines for built in decoder.built)
    assert (engine.kind, engine.fused_attention) == ("decode", 0)
