"""Parity of a bundle's text encoder and decoder with PyTorch."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator

from sg_calibration.prompts import read_prompts
from sg_export.graph.check import check_reference, run_onnx
from sg_export.graph.emulate import emulated
from sg_export.graph.overflow import first_overflow
from sg_export.loading import found_by_name
from sg_export.options.types import BASES
from sg_export.parity.compare import Comparison, Feed, Parity, compare_arrays
from sg_export.parity.polygraphy import engine_command, inputs_of_graph, onnx_commands, save_data
from sg_export.parts.decode import LoadedDecoder, load_decoder
from sg_export.parts.encode import tokenized
from sg_export.parts.text import LoadedText, load_text
from sg_export.progress import Report
from sg_export.reference import place_of
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CheckpointError
from sg_runtime.manifest import GraphFacts, Part, PartFacts, Text, TextEncoder
from sg_runtime.pipeline import Pipeline

INPUTS = 3
"""Number of prompts or latents that a part is compared at."""


def reload_part(
    bundle: Bundle, part: Part, checkpoint: str | Path | None, pipeline: Path | None, vae: Path | None
) -> LoadedText | LoadedDecoder:
    """Load the network of a part from the folder that the bundle was built from.

    pipeline, vae: folders; see `CompileOptions`. By default the folder of the recorded name, which
    is `checkpoint`, next to the bundle or in the current folder.

    Raises CheckpointError if the folder is missing or holds another network.
    """
    facts, model = bundle.manifest.parts[part], bundle.manifest.model
    folder = pipeline if part == "text" else vae or pipeline
    checkpoint = checkpoint or bundle.manifest.source.reference
    if folder is None and checkpoint is not None and place_of(checkpoint).resolve().name == facts.source.file:
        folder = place_of(checkpoint)
    folder = folder or found_by_name(bundle, facts.source)
    if folder is None:
        raise CheckpointError(
            f"{bundle.path}: the folder of its part {part}, {facts.source.file}, is neither next to the bundle nor in "
            f"the current folder: give `{'pipeline' if part == 'text' else 'vae'}`"
        )
    variant = None if facts.source.weights == "bare" else facts.source.weights
    loaded: LoadedText | LoadedDecoder
    if isinstance(facts, TextEncoder):
        loaded = load_text(folder, model, facts.cleaning, variant)
    else:
        loaded = load_decoder(folder, model, variant)
    if loaded.source.sha256 != facts.source.sha256:
        raise CheckpointError(
            f"{folder}: expected SHA-256 {facts.source.sha256[:12]}…, from which the part {part} of {bundle.path} was "
            f"built, found {loaded.source.sha256[:12]}…: give that folder, or build a new bundle"
        )
    return loaded


def compare_parts(
    bundle: Bundle,
    networks: Mapping[Part, LoadedText | LoadedDecoder],
    pipeline: Pipeline | None,
    folder: Path | None,
    report: Report,
) -> Parity:
    """Compare text encoder and decoder with PyTorch, at prompts and at noise.

    pipeline: runs the graphs; None for the CPU, where half-precision graphs run in FP32 with
    the rounding of their type. folder: see `verify.verify`.
    """
    comparisons, commands = [], list[str]()
    for part, facts in bundle.manifest.parts.items():
        graph = bundle.manifest.part_graph(part)
        assert graph is not None
        report(f"comparing {graph.name}", 0, None)
        feeds = _feeds(bundle, networks[part])
        (results,) = Comparator.run([_ModuleRunner(networks[part].module, graph)], data_loader=feeds)
        wanted = [result[graph.outputs[0].name] for result in results[1]]
        check_reference(networks[part].source, graph.name, *wanted)
        if folder is not None:
            data = save_data(folder, graph.name, graph, feeds, results)
            commands += onnx_commands(bundle, graph, data, facts.precision)
            commands += [
                engine_command(bundle, engine, 0, data, facts.precision)
                for built in facts.built
                if built.graph == graph
                for engine in built.engines
            ]
        if pipeline is None and graph.file is None:
            continue  # engines alone, which do not run here
        compared = [
            _compared(bundle, part, facts, graph, feed, output, pipeline)
            for feed, output in zip(feeds, wanted, strict=True)
        ]
        comparisons.append(max(compared, key=lambda c: (not c.passed, c.relative_l2)))
    return Parity(tuple(comparisons), tuple(commands))


def _compared(
    bundle: Bundle,
    part: Part,
    facts: PartFacts,
    graph: GraphFacts,
    feed: Feed,
    wanted: NDArray[Any],
    pipeline: Pipeline | None,
) -> Comparison:
    """Compare a part at one input. Embeddings of padding do not count."""
    gates, name = BASES[facts.precision].gates, graph.outputs[0].name
    if pipeline is None:
        path = bundle.onnx(graph)
        (found,) = run_onnx(path, feed, None if facts.precision == "fp32" else emulated(path))
    else:
        (found,) = pipeline.run_part(part, feed)
    counted = feed["mask"] == 1 if "mask" in feed else ...
    compared = compare_arrays(graph.name, name, None, wanted[counted], found[counted], gates.graph, gates.cosine)
    if not np.isfinite(found[counted]).all() and facts.precision != "fp32" and graph.file is not None:
        compared = replace(compared, overflow=first_overflow(bundle.onnx(graph), feed))
    return compared


def _feeds(bundle: Bundle, loaded: LoadedText | LoadedDecoder) -> list[Feed]:
    """Return INPUTS inputs: prompts, the first of which is no prompt, or noise."""
    model = bundle.manifest.model
    if isinstance(loaded, LoadedText):
        assert isinstance(model.conditions, Text)
        tokens = tokenized(loaded, ["", *read_prompts(None)[: INPUTS - 1]], model.conditions.tokens)
        return [{"ids": tokens.ids[[row]], "mask": tokens.mask[[row]]} for row in range(INPUTS)]
    draw = np.random.default_rng(0)
    return [{"latents": draw.standard_normal((1, *model.latent), np.float32)} for _ in range(INPUTS)]


class _ModuleRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """A Polygraphy runner of a module of PyTorch that computes a graph."""

    def __init__(self, module: torch.nn.Module, graph: GraphFacts) -> None:
        super().__init__(name="pytorch", prefix="pytorch")
        self.module, self.graph = module, graph

    def get_input_metadata_impl(self) -> TensorMetadata:
        return inputs_of_graph(self.graph)

    def infer_impl(self, feed_dict: Feed) -> "OrderedDict[str, NDArray[Any]]":
        self.inference_time = 0.0
        with torch.no_grad():
            output = self.module(*(torch.from_numpy(feed_dict[tensor.name]) for tensor in self.graph.inputs))
        return OrderedDict([(self.graph.outputs[0].name, output.numpy())])
