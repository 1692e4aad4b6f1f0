"""Fixtures of the compiler's tests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text import CONTEXT, TEXT, SmallPRX
from weights import random_state

from sg_export.adapters import maskdit as maskdit_adapter
from sg_export.adapters.dit import default_sampling
from sg_export.loading import LoadedModel
from sg_export.models import maskdit
from sg_export.models.dit import AdaLNNetwork, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_export.models.sparse import SparseModel
from sg_runtime.manifest import Labels, ModelFacts, Route, Source, Text

MakeModel = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def fixed_bundle(build_once: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """Bundle of the tiny model for SG at sparsities 0.25 and 0.5, for batches of three images.

    It lies next to its checkpoint.
    """
    return build_once("fixed-bundle", tiny_checkpoint, sparsity=(0.5,), strong_sparsity=(0.25,), batch=3)


@pytest.fixture(scope="session")
def quick(tiny: Any) -> Any:
    """Maker of checkpoints of the tiny network with one block, which is the route.

    These are the fastest to trace.
    """
    return replace(tiny, config=replace(tiny.config, depth=1), facts={**tiny.facts, "route": "0-0"})


@pytest.fixture(scope="session")
def quick_checkpoint(quick: Any, once: Callable[..., Path]) -> Path:
    """A checkpoint made by `quick`."""
    return once("quick.safetensors", quick.save)


@pytest.fixture(scope="session")
def untrained(quick: Any, once: Callable[..., Path]) -> Path:
    """A checkpoint of the quick network as its own initialisation leaves it.

    Upstream initialises adaLN and the head to zero, so all outputs are zero.
    """
    state = {
        name: torch.zeros_like(tensor) if "adaLN" in name or name.startswith("final_layer") else tensor
        for name, tensor in quick.state().items()
    }
    return once("untrained.safetensors", lambda path: quick.save(path, state))


def shrink_decoder(patch: pytest.MonkeyPatch) -> None:
    """Give MaskDiT a decoder of 2 blocks of width 24 with 3 heads.

    Upstream's decoder alone would take 100 MB.
    """
    for name, value in (("DECODER_WIDTH", 24), ("DECODER_DEPTH", 2), ("DECODER_HEADS", 3)):
        patch.setattr(maskdit, name, value)
    patch.setattr(maskdit_adapter, "DECODER_WIDTH", 24)


@pytest.fixture
def small_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give MaskDiT a small decoder for one test."""
    shrink_decoder(monkeypatch)


@pytest.fixture
def undecomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to decompose a program: its tracing would take two to three times as long."""

    def refused(*_: Any) -> None:
        raise AssertionError("expected a program that is translated as it is")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refused)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Return a function that makes a model from a network's class, shape and route.

    All weights are random and non-zero. A MaskDiT is masked in its entire encoder, regardless of
    the route, and its decoder is small.
    """

    def make(network_class: type[AdaLNNetwork], config: DiTConfig, route: Route, seed: int = 1) -> LoadedModel:
        masked, text = network_class is MaskDiT, issubclass(network_class, SmallPRX)
        with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
            shrink_decoder(patch)
            network = network_class(config)
        state = network.state_dict()
        values = random_state({name: list(tensor.shape) for name, tensor in state.items()}, seed, {})
        network.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, assign=True)
        facts = ModelFacts(
            family="maskdit" if masked else "prx" if text else "tread",
            prediction="edm" if masked else "flow",
            space="latent",
            latent=(config.channels, config.image_size, config.image_size),
            pixels_per_latent=None,
            patch=config.patch,
            tokens=config.tokens,
            width=config.width,
            depth=config.depth,
            heads=getattr(network.config, "heads", config.heads),
            conditions=Text(TEXT, CONTEXT) if text else Labels(config.num_classes, None),
            held=network.held,
            parameters=sum(tensor.numel() for tensor in state.values()),
            route=Route(0, config.depth - 1) if masked else route,
            ends=network.ends,
            masked=masked,
        )
        layers = Route(0, config.depth) if masked else route
        model = SparseModel(network, layers).eval().requires_grad_(False)
        sampling = default_sampling(facts.prediction)
        return LoadedModel(model, facts, sampling, Source("random.pt", "0" * 64, "bare", None))

    return make
