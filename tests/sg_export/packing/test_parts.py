"""Engines of decoders, which differ from those of steps by their opset and their attention."""

from pathlib import Path

import pytest
from full_pipelines import autoencoder

from sg_export.compiler import compile
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_runtime.manifest import Precision


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_compile_builds_a_decoder_whose_attention_has_no_fused_kernel(
    precision: Precision, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Steps without fused attention are refused."""
    autoencoder(channels=2).save_pretrained(tmp_path / "vae")
    engines = EngineOptions(compute_capabilities=(89,))
    options = CompileOptions(tmp_path / "out", (0.5,), precision=precision, vae=tmp_path / "vae", engines=engines)
    decoder = compile(tiny_checkpoint, options).manifest.decoder
    assert decoder is not None
    ((engine,),) = (built.engines for built in decoder.built)
    assert (engine.kind, engine.fused_attention) == ("decode", 0)
