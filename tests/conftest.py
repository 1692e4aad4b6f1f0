"""Fixtures shared by the tests of several packages."""

import fcntl
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor, nn
from weights import random_state

import sg_export.graph.trace
import sg_export.packing.parts
from sg_calibration.ranges import write_table
from sg_calibration.settings import FeedSettings
from sg_export.checkpoint import Overrides
from sg_export.compiler import compile
from sg_export.graph.trace_part import trace_part
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_export.models.sparse import SparseModel
from sg_export.options.compile import CompileOptions
from sg_export.options.engines import EngineOptions
from sg_export.options.quantize import QuantizeOptions
from sg_export.quantize.search import measure_ranges
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import QualityGates, Route

# A busy machine must not fail a test by a deadline.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

TINY = DiTConfig(image_size=8, patch=2, channels=2, width=32, depth=3, heads=2, mlp_width=128, num_classes=5)
"""Configuration of a latent model with 16 tokens.

The shape of each part differs from the shapes of the others. A graph is traced in about a second.
"""

TINY_FACTS = {"family": "tread", "heads": 2, "route": "1-1", "prediction": "flow", "selection_rate": 0.5}
"""Facts of the tiny checkpoint: one block before the route, one in it, one after it."""


@dataclass(frozen=True)
class Tiny:
    """Writer of checkpoints of a small network; every tensor element is random and not zero."""

    config: DiTConfig
    facts: Mapping[str, Any]
    network: type[DiT] = DiT

    def state(self, seed: int = 1) -> dict[str, Tensor]:
        """Return the network's tensors by name."""
        with torch.device("meta"):
            shapes = {name: list(tensor.shape) for name, tensor in self.network(self.config).state_dict().items()}
        return {name: torch.from_numpy(value) for name, value in random_state(shapes, seed, {}).items()}

    def save(self, path: Path, content: Any = None, facts: Mapping[str, Any] | None = None) -> Path:
        """Write `content` to `path`, together with `facts`.

        The defaults are the network's tensors and its own facts. The facts go into the metadata of
        a .safetensors file, or into a JSON file next to any other file.
        """
        content = self.state() if content is None else content
        text = json.dumps(dict(self.facts if facts is None else facts))
        if path.suffix == ".safetensors":
            save_file(content, path, {"sg_export": text})
        else:
            torch.save(content, path)
            path.with_suffix(".json").write_text(text)
        return path


SLOW = {
    *("glyphs_bundle", "bundles", "engine_bundle", "engines", "xl", "prx"),
    *("full_pipeline", "full_bundle"),
    *("half_bundle", "tiny_int8_bundle", "tiny_fp8_bundle", "tiny_half_bundle"),
}
"""Fixtures that take long to build and that few tests need.

They are of the reference model, quantized, with engines, of a large network with text, or of a
complete pipeline.
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use a fixture of `SLOW` as slow, also if only a parameter names it."""
    for item in items:
        named = getattr(item, "callspec", None)
        values = [] if named is None else [value for value in named.params.values() if isinstance(value, str)]
        if SLOW & {*getattr(item, "fixturenames", ()), *values}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run PyTorch and ONNX Runtime in one thread each.

    Small networks do not gain from threads. ONNX Runtime's threads keep spinning after a run, on
    the core of the other test worker.
    """
    torch.set_num_threads(1)

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", OneThread)
        yield


def export_untraced(*arguments: Any) -> Any:
    """Call the exporter without a coverage tracer.

    The tracer would double the exporter's time, because it also follows PyTorch's frames.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return _EXPORT(*arguments)
    finally:
        sys.settrace(tracer)


_EXPORT = sg_export.graph.trace._export


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files that tests only read. All workers of a test run share it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(shared: Path) -> Once:
    """Return `once(name, make)`, which makes a file or folder of `shared` if it does not exist.

    One worker calls `make(path)`; the others wait for it.
    """

    def once(name: str, make: Callable[[Path], object]) -> Path:
        with (shared / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / name).exists():
                make(shared / name)
        return shared / name

    return once


def write_trace(exported: tuple[ir.Model, Any], path: Path) -> None:
    """Write the exporter's result. The weights, which no node makes, become inputs of the file."""
    model, layers = exported
    inputs, known = model.graph.inputs, {*model.graph.inputs, *model.graph.initializers.values()}
    used = (value for node in model.graph for value in node.inputs if value and value.producer() is None)
    count = len(inputs)
    inputs.extend(dict.fromkeys(value for value in used if value not in known))
    path.write_bytes(pickle.dumps((count, ir.to_proto(model).SerializeToString(), layers)))
    del inputs[count:]


def read_trace(path: Path) -> tuple[ir.Model, Any]:
    """Return what `write_trace` wrote."""
    count, content, layers = pickle.loads(path.read_bytes())
    model = ir.from_proto(onnx.ModelProto.FromString(content))
    del model.graph.inputs[count:]
    return model, layers


@pytest.fixture(scope="session", autouse=True)
def _traced_once(once: Once) -> Iterator[None]:
    """Trace each network structure, and each part with its weights, once for all tests and workers.

    The exporter's result for a network holds no weights.
    """
    traced: dict[str, Any] = {}

    def export(model: SparseModel, *arguments: Any) -> Any:
        structure = (str(model), vars(model.network).get("config"), model.route)
        key = repr((structure, next(model.parameters()).device, *arguments))
        if key not in traced:
            name = f"{hashlib.sha256(key.encode()).hexdigest()}.trace"
            traced[key] = read_trace(once(name, lambda path: write_trace(export_untraced(model, *arguments), path)))
        return traced[key]

    def export_part(module: nn.Module, name: str, *arguments: Any) -> ir.Model:
        state = hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values()))
        key = repr((str(module), state.hexdigest(), name, arguments[:-1], arguments[-1].__name__))
        file = f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
        return ir.load(once(file, lambda path: ir.save(trace_part(module, name, *arguments), path)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg_export.graph.trace, "_export", export)
        patch.setattr(sg_export.packing.parts, "trace_part", export_part)
        yield


@pytest.fixture(scope="module", autouse=True)
def _traced_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Undo `_traced_once` in the modules that test tracing."""
    with pytest.MonkeyPatch.context() as patch:
        if Path(request.path).stem in ("test_stamp", "test_trace", "test_trace_errors", "test_trace_packed"):
            patch.setattr(sg_export.graph.trace, "_export", export_untraced)
        yield


Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build_once(once: Once) -> Build:
    """Return `build_once(name, checkpoint, **options)`, which compiles a bundle into `shared`.

    If the bundle exists, it is reused.
    """

    def build(name: str, checkpoint: str | Path, **options: Any) -> Path:
        return once(name, lambda path: compile(checkpoint, CompileOptions(path, **options)))

    return build


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the engines that tests build into a temporary cache instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SG_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny(TINY, TINY_FACTS)


@pytest.fixture(scope="session")
def tiny_masked() -> Tiny:
    """Return a MaskDiT with an encoder of the same size, except for narrower MLPs.

    The decoder has its usual width.
    """
    return Tiny(replace(TINY, mlp_width=32), {"heads": 2}, MaskDiT)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny: Tiny, once: Once) -> Path:
    """Return a .safetensors file with all facts in its metadata."""
    return once("tiny.safetensors", tiny.save)


@pytest.fixture(scope="session")
def tiny_bundle(build_once: Build, tiny_checkpoint: Path) -> Path:
    """Return a bundle of the tiny model: symbolic batch, six graphs, next to its checkpoint.

    The strong sparsities are 0 and 0.25; the weak sparsity is 0.5.
    """
    return build_once("tiny-bundle", tiny_checkpoint, sparsity=(0.5,), strong_sparsity=(0.0, 0.25))


# The bundles below have graphs of three images, which take half the time to trace.


@pytest.fixture(scope="session")
def tiny_edm_bundle(build_once: Build, once: Once, tiny: Tiny) -> Path:
    """Return a bundle of the tiny network as a denoiser (edm), next to its checkpoint.

    It is built for SG at sparsities 0.25 and 0.5.
    """
    facts = {**tiny.facts, "prediction": "edm"}
    checkpoint = once("tiny-edm.safetensors", lambda path: tiny.save(path, facts=facts))
    return build_once("tiny-edm-bundle", checkpoint, sparsity=(0.5,), strong_sparsity=(0.25,), batch=3)


@pytest.fixture(scope="session")
def tiny_cfg_bundle(build_once: Build, tiny_checkpoint: Path) -> Path:
    """Return the tiny model built for CFG at sparsities 0 and 0.25, next to its checkpoint."""
    options = {"sparsity": (), "strong_sparsity": (0.0, 0.25), "scale": 1.5, "guidance": "cfg", "batch": 3}
    return build_once("tiny-cfg-bundle", tiny_checkpoint, **options)


@pytest.fixture(scope="session")
def tiny_cfg_sg_bundle(build_once: Build, tiny_checkpoint: Path) -> Path:
    """Return the tiny model built for CFG + SG at 0.25 and 0.5, next to its checkpoint."""
    options = {"sparsity": (0.5,), "strong_sparsity": (0.25,), "scale": 1.5, "guidance": "cfg+sg", "batch": 3}
    return build_once("tiny-cfg-sg-bundle", tiny_checkpoint, **options)


@pytest.fixture(scope="session")
def tiny_autoguidance_bundle(build_once: Build, once: Once, tiny: Tiny, tiny_checkpoint: Path) -> Path:
    """Return the tiny model guided by a network with other weights, next to both checkpoints.

    The strong sparsity is 0; the weak sparsities are 0.5 and 0.
    """
    weak = once("tiny-weak.safetensors", lambda path: tiny.save(path, tiny.state(seed=2)))
    options = {"sparsity": (0.5, 0.0), "weak_checkpoint": weak, "batch": 3}
    return build_once("tiny-autoguidance-bundle", tiny_checkpoint, **options)


@pytest.fixture(scope="session")
def engine_bundle(build_once: Build, tiny_checkpoint: Path) -> Path:
    """Return a bundle that holds only TensorRT-RTX engines, in FP16, for SG at 0 and 0.5.

    The engines are for TensorRT-RTX's default GPUs.
    """
    options = {"sparsity": (0.5,), "engines": EngineOptions(), "precision": "fp16"}
    return build_once("engine-bundle", tiny_checkpoint, **options)


@pytest.fixture(scope="session")
def full_pipeline(once: Once) -> Path:
    """Return the folder of a complete pipeline of a tiny PRX; see `full_pipelines`."""
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    from full_pipelines import write_full_pipeline

    return once("prx-full", write_full_pipeline)


@pytest.fixture(scope="session")
def full_bundle(build_once: Build, full_pipeline: Path) -> Path:
    """Return a bundle of the complete pipeline, for CFG and one image, next to its folder."""
    route = Overrides(route=Route(0, 1))
    return build_once("prx-full-bundle", full_pipeline, guidance="cfg", batch=1, scale=3.0, overrides=route)


@pytest.fixture(scope="session")
def tiny_ranges(once: Once, tiny_bundle: Path, shared: Path) -> Path:
    """Return activation ranges of the tiny model, from two images for each pair of sparsities.

    The shards are in the folder `feeds` next to the table.
    """

    def measure(path: Path) -> None:
        bundle, feeds = Bundle.open(tiny_bundle), FeedSettings(samples=2)
        write_table(measure_ranges(bundle, feeds, None, shared / "feeds", lambda *_: None), path)

    return once("tiny-ranges.json", measure)


@pytest.fixture(scope="session")
def quantize_tiny(tiny_ranges: Path) -> Callable[..., QuantizeOptions]:
    """Return a function that makes quantization options for the tiny model.

    Its gates are wide enough for random weights.
    """
    usual = {"table": tiny_ranges, "gates": QualityGates(0.5, 1.0), "search_images": 1, "gate_images": 2}
    return lambda type, **changes: QuantizeOptions(type, **{**usual, **changes})


@pytest.fixture(scope="session")
def tiny_int8_bundle(build_once: Build, tiny_checkpoint: Path, quantize_tiny: Callable[..., QuantizeOptions]) -> Path:
    """Return `tiny_bundle` in INT8 with one excluded layer, next to its checkpoint."""
    quantize = quantize_tiny("int8", exclude=("blocks.2.mlp.fc2",))
    options = {"sparsity": (0.5,), "strong_sparsity": (0.0, 0.25), "quantize": quantize}
    return build_once("tiny-int8", tiny_checkpoint, **options)


@pytest.fixture(scope="session")
def tiny_cosine_bundle(build_once: Build, tiny_checkpoint: Path) -> Path:
    """Return the tiny model built for SG with every schedule, next to its checkpoint.

    The strong sparsity rises from 0 to 0.25. The weak sparsity falls from 0.5 over 0.25 to 0. The
    scale falls from 3 to 1.5. Guidance applies from t = 0.15 to 0.9.
    """
    return build_once(
        "tiny-cosine-bundle",
        tiny_checkpoint,
        sparsity=(0.5, 0.0),
        strong_sparsity=(0.0, 0.25),
        schedule="cosine",
        scale=(3.0, 1.5),
        interval=(0.15, 0.9),
        batch=3,
    )


@pytest.fixture(scope="session")
def picture_bundle(build_once: Build, once: Once, tiny: Tiny) -> Path:
    """Return a bundle of the fastest kind to build that gives pictures: 8×8 pixels in colour.

    The network has one block, five classes and no guidance. The batch is symbolic.
    """
    small = replace(tiny, config=replace(TINY, depth=1, channels=3), facts={**tiny.facts, "route": "0-0"})
    return build_once("picture-bundle", once("picture.safetensors", small.save), guidance="none", sparsity=())


@pytest.fixture(scope="session")
def glyphs_bundle(build_once: Build) -> Path:
    """Return a bundle of the reference model with a symbolic batch.

    The strong sparsities are 0 and 0.25; the weak sparsities are 0.5 and 0.75.
    """
    return build_once("glyphs", "glyphs", sparsity=(0.5, 0.75), strong_sparsity=(0.0, 0.25))
