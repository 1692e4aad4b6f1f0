"""Fixtures that several rooms share."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor
from weights import random_state

from sg_calibration.ranges import write_table
from sg_calibration.settings import FeedSettings
from sg_export.compiler import compile
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_export.options import CompileOptions
from sg_export.quantization import measure_ranges
from sg_export.quantize_options import QuantizeOptions
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import Gates

# A busy machine is no fault of the code.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

TINY = DiTConfig(image_size=8, patch=2, channels=2, width=32, depth=3, heads=2, mlp_width=128, num_classes=5)
"""16 tokens of a latent model: the shape of each part differs from the others', and a graph is traced in a second."""

TINY_FACTS = {"family": "tread", "heads": 2, "route": "1-1", "prediction": "flow", "selection_rate": 0.5}
"""One block before the route, one in it, one after it."""


@dataclass(frozen=True)
class Tiny:
    """Makes checkpoints of a small network with a random non-zero value in every place."""

    config: DiTConfig
    facts: Mapping[str, Any]
    network: type[DiT] = DiT

    def state(self, seed: int = 1) -> dict[str, Tensor]:
        """The network's tensors by name."""
        with torch.device("meta"):
            shapes = {name: list(tensor.shape) for name, tensor in self.network(self.config).state_dict().items()}
        return {name: torch.from_numpy(value) for name, value in random_state(shapes, seed, {}).items()}

    def save(self, path: Path, content: Any = None, facts: Mapping[str, Any] | None = None) -> Path:
        """Write `content` (by default the network's tensors) as `path`, and `facts` (by default its own) with it.

        The facts go into the metadata of a .safetensors and beside any other file.
        """
        content = self.state() if content is None else content
        text = json.dumps(dict(self.facts if facts is None else facts))
        if path.suffix == ".safetensors":
            save_file(content, path, {"sg_export": text})
        else:
            torch.save(content, path)
            path.with_suffix(".json").write_text(text)
        return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """PyTorch's threads gain small networks nothing, and wait for ONNX Runtime's, which spin on after a run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines that tests build go into a cache of theirs, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SG_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny(TINY, TINY_FACTS)


@pytest.fixture(scope="session")
def tiny_masked() -> Tiny:
    """A MaskDiT with an encoder as small, but for narrower MLPs: the decoder is as wide as ever."""
    return Tiny(replace(TINY, mlp_width=32), {"heads": 2}, MaskDiT)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .safetensors with all facts in its metadata."""
    return tiny.save(tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """The tiny model, its checkpoint beside it: strong sparsities 0 and 0.25, weak 0.5, symbolic batch, six graphs."""
    options = CompileOptions(tiny_checkpoint.parent / "tiny-bundle", sparsity=(0.5,), strong_sparsity=(0.0, 0.25))
    return compile(tiny_checkpoint, options).path


# The bundles below have graphs of three images, which take half the time to trace.


@pytest.fixture(scope="session")
def tiny_edm_bundle(tiny: Tiny, tiny_checkpoint: Path) -> Path:
    """The tiny network as one that denoises, for SG at sparsities 0.25 and 0.5, its checkpoint beside it."""
    folder = tiny_checkpoint.parent
    checkpoint = tiny.save(folder / "tiny-edm.safetensors", facts={**tiny.facts, "prediction": "edm"})
    return compile(checkpoint, CompileOptions(folder / "tiny-edm-bundle", (0.5,), (0.25,), batch=(3,))).path


@pytest.fixture(scope="session")
def tiny_cfg_bundle(tiny_checkpoint: Path) -> Path:
    """The tiny model for CFG at sparsities 0 and 0.25, its checkpoint beside it."""
    output = tiny_checkpoint.parent / "tiny-cfg-bundle"
    options = CompileOptions(output, (), (0.0, 0.25), scale=1.5, guidance="cfg", batch=(3,))
    return compile(tiny_checkpoint, options).path


@pytest.fixture(scope="session")
def tiny_cfg_sg_bundle(tiny_checkpoint: Path) -> Path:
    """The tiny model for CFG + SG at sparsities 0.25 and 0.5, its checkpoint beside it."""
    output = tiny_checkpoint.parent / "tiny-cfg-sg-bundle"
    options = CompileOptions(output, (0.5,), (0.25,), scale=1.5, guidance="cfg+sg", batch=(3,))
    return compile(tiny_checkpoint, options).path


@pytest.fixture(scope="session")
def tiny_autoguidance_bundle(tiny: Tiny, tiny_checkpoint: Path) -> Path:
    """The tiny model guided by other weights at strong sparsity 0, weak 0.5 and 0, both checkpoints beside it."""
    folder = tiny_checkpoint.parent
    weak = tiny.save(folder / "tiny-weak.safetensors", tiny.state(seed=2))
    options = CompileOptions(folder / "tiny-autoguidance-bundle", (0.5, 0.0), weak_checkpoint=weak, batch=(3,))
    return compile(tiny_checkpoint, options).path


@pytest.fixture(scope="session")
def engine_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines alone of the tiny model in FP16, by TensorRT-RTX for the GPUs of its own choice, for SG at 0 and 0.5."""
    output = tmp_path_factory.mktemp("engines") / "bundle"
    options = CompileOptions(output, (0.5,), targets=("tensorrt-rtx",), precision="fp16")
    return compile(tiny_checkpoint, options).path


@pytest.fixture(scope="session")
def tiny_ranges(tiny_bundle: Path) -> Path:
    """Ranges of the tiny model's activations, from two images for each pair; the shards are in `feeds` beside it."""
    folder = tiny_bundle.parent
    bundle, feeds = Bundle.open(tiny_bundle), FeedSettings(samples=2)
    write_table(measure_ranges(bundle, feeds, None, folder / "feeds", lambda *_: None), folder / "tiny-ranges.json")
    return folder / "tiny-ranges.json"


@pytest.fixture(scope="session")
def quantize_tiny(tiny_ranges: Path) -> Callable[..., QuantizeOptions]:
    """Options for the tiny model, whose random weights pass gates as wide as these."""
    usual = {"table": tiny_ranges, "gates": Gates(0.5, 1.0), "search_images": 1, "gate_images": 2}
    return lambda type, **changes: QuantizeOptions(type, **{**usual, **changes})


@pytest.fixture(scope="session")
def tiny_int8_bundle(tiny_checkpoint: Path, quantize_tiny: Callable[..., QuantizeOptions]) -> Path:
    """The tiny model as `tiny_bundle` has it, in INT8 but for one layer that is excluded, its checkpoint beside it."""
    quantize = quantize_tiny("int8", exclude=("blocks.2.mlp.fc2",))
    options = CompileOptions(tiny_checkpoint.parent / "tiny-int8", (0.5,), (0.0, 0.25), quantize=quantize)
    return compile(tiny_checkpoint, options).path


@pytest.fixture(scope="session")
def tiny_cosine_bundle(tiny_checkpoint: Path) -> Path:
    """The tiny model for SG with all that may change over a run, its checkpoint beside it.

    The strong sparsity rises from 0 to 0.25, the weak one falls from 0.5 by way of 0.25 to 0, the scale falls from 3 to
    1.5, and guidance applies from t = 0.15 to 0.9.
    """
    options = CompileOptions(
        tiny_checkpoint.parent / "tiny-cosine-bundle",
        sparsity=(0.5, 0.0),
        strong_sparsity=(0.0, 0.25),
        schedule="cosine",
        scale=(3.0, 1.5),
        interval=(0.15, 0.9),
        batch=(3,),
    )
    return compile(tiny_checkpoint, options).path


@pytest.fixture(scope="session")
def glyphs_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model as a bundle with strong sparsities 0 and 0.25 and weak ones 0.5 and 0.75, symbolic batch."""
    output = tmp_path_factory.mktemp("bundles") / "glyphs"
    options = CompileOptions(output, sparsity=(0.5, 0.75), strong_sparsity=(0.0, 0.25))
    return compile("glyphs", options).path
