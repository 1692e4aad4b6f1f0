"""Data and Polygraphy commands for engines, which run on their GPU alone."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from polygraphy.comparator import RunResults
from polygraphy.json import load_json

from sg_export.loading import reload_checkpoint
from sg_export.options.engines import EngineOptions
from sg_export.options.types import BASES
from sg_export.parity.polygraphy import engine_command
from sg_export.parity.torch_backend import TorchBackend
from sg_export.parity.verify import verify
from sg_runtime.backends.ort import open_session
from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError
from sg_runtime.manifest import Precision
from sg_runtime.pipeline import Pipeline

TIMES = (0.1, 0.9)
DATA = ("--load-inputs", "in.json", "--load-outputs", "out.json")
OPTIONS = {"sparsity": (0.5,), "engines": EngineOptions(batch=(1, 2), keep_onnx=True)}

Saved = tuple[Bundle, Path, list[str]]


@pytest.fixture(scope="module")
def trt_bundle(build_once: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """Return the bundle of `saved` with its graphs."""
    return build_once("trt-bundle", tiny_checkpoint, **OPTIONS)


@pytest.fixture(scope="module")
def saved(trt_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A bundle of engines alone, the folder with its data, and the commands."""
    bundle = tmp_path_factory.mktemp("engines alone") / "bundle"
    shutil.copytree(trt_bundle, bundle)
    shutil.copy(tiny_checkpoint, bundle.parent)
    shutil.rmtree(bundle / "graphs")
    content = json.loads((bundle / "manifest.json").read_text())
    content["graphs"] = [graph | {"file": None} for graph in content["graphs"]]
    content["files"] = {name: facts for name, facts in content["files"].items() if name.startswith("engines/")}
    (bundle / "manifest.json").write_text(json.dumps(content))
    folder = bundle.parent / "saved here"
    parity = verify(bundle, times=TIMES, save_polygraphy=folder)
    assert parity.comparisons == ()
    return Bundle.open(bundle), folder, [*parity.commands]


def options_of(command: str) -> dict[str, str]:
    words = shlex.split(command)
    return {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}


def test_verify_saves_data_and_a_command_for_every_profile(saved: Saved) -> None:
    bundle, folder, commands = saved
    rows = bundle.manifest.hoisted_rows["condition"]
    names = [f"condition-{rows}", *(f"{name}-{n}" for name in ("dense", "sparse-8", "guided-16-8") for n in (1, 2))]
    names = [name for name in names if name.partition("-")[0] in {e.kind for e in bundle.manifest.engines}]
    assert {path.name for path in folder.iterdir()} == {
        f"{name}-{part}.json" for name in names for part in ("inputs", "outputs")
    }
    asked = {(shlex.split(line)[3], options_of(line)["--optimization-profile"]) for line in commands}
    profiles = sum(len(engine.profiles) for engine in bundle.manifest.engines)
    assert len(commands) == len(asked) == len(names) == profiles >= 3
    assert all(line.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run ") for line in commands)


def test_saved_inputs_have_the_shapes_of_the_profile(saved: Saved) -> None:
    bundle, _, commands = saved
    for command in commands:
        options, file = options_of(command), Path(shlex.split(command)[3])
        (engine,) = (engine for engine in bundle.manifest.engines if bundle.file(engine.file) == file)
        profile = engine.profiles[int(options["--optimization-profile"])]
        feeds: list[dict[str, NDArray[Any]]] = load_json(options["--load-inputs"])
        assert len(feeds) == len(TIMES)
        for feed in feeds:
            name = "t" if engine.kind == "condition" else "x"
            assert len(feed[name]) == profile.batch
            rows = {keep for keep in profile.keep if keep < bundle.manifest.model.tokens}
            assert {values.shape[1] for name, values in feed.items() if name.startswith("rows")} == rows


def test_saved_outputs_are_those_of_the_graphs(saved: Saved, trt_bundle: Path) -> None:
    whole, folder = Bundle.open(trt_bundle), saved[1]
    for graph, rows in ((whole.manifest.graph("guided", 16, 8), 2), (whole.manifest.hoisted("main")[0], None)):
        assert graph is not None
        name = f"{graph.name}-{rows or whole.manifest.hoisted_rows['condition']}"
        session, feeds = open_session(whole.onnx(graph)), load_json(str(folder / f"{name}-inputs.json"))
        ((_, wanted),) = RunResults.load(str(folder / f"{name}-outputs.json"))
        for feed, outputs in zip(feeds, wanted, strict=True):
            for output, found in zip(graph.outputs, session.run(None, feed), strict=True):
                np.testing.assert_allclose(found, outputs[output.name], rtol=1e-4, atol=1e-4)  # BASES["fp32"]


def script_of(command: str) -> str:
    """Return the script that Polygraphy's command line would run. It has parsed the command."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    shell = {"shell": True, "capture_output": True, "text": True, "timeout": 120, "env": os.environ | {"PATH": path}}
    done = subprocess.run(f"{command} --gen-script -", check=False, **shell)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_commands_are_parsed_by_polygraphy(saved: Saved) -> None:
    for command in saved[2]:
        given, script = options_of(command), script_of(command)
        number, inputs, outputs = (
            given[f"--{name}"] for name in ("optimization-profile", "load-inputs", "load-outputs")
        )
        assert f"optimization_profile={number}, allocation_strategy='profile')" in script
        assert f"BytesFromPath({shlex.split(command)[3]!r})" in script
        assert f"StreamingDataLoader([{inputs!r}]" in script
        assert f"RunResults.load_streaming({outputs!r}" in script
        assert "SimpleCompareFunc(rtol={'': 0.0001}, atol={'': 0.0001})" in script


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_command_holds_the_thresholds_of_the_precision(saved: Saved, precision: Precision) -> None:
    bundle = Bundle(saved[0].path, replace(saved[0].manifest, precision=precision))
    tolerance = f"{BASES[precision].tolerance:g}"
    command = engine_command(bundle, bundle.manifest.engines[0], 0, DATA)
    assert command.endswith(f" --load-outputs out.json --atol {tolerance} --rtol {tolerance}")


def test_command_of_tensorrt_asks_for_no_rtx(saved: Saved) -> None:
    bundle, *_ = saved
    engine = bundle.manifest.engines[0]
    ours = engine_command(bundle, replace(engine, library="tensorrt"), 0, DATA)
    assert f"POLYGRAPHY_USE_TENSORRT_RTX=1 {ours}" == engine_command(bundle, engine, 0, DATA)
    assert ours.startswith("polygraphy run ")


def test_verify_of_engines_alone_without_a_folder_names_the_alternatives(saved: Saved) -> None:
    with pytest.raises(
        BundleError, match=r"found only engines; rebuild it with `keep_onnx`, or give `save_polygraphy`"
    ):
        verify(saved[0].path)


def test_pipeline_by_pytorch_samples_what_the_graphs_sample(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    loaded = reload_checkpoint(bundle, None)
    classes, seeds = [0, 1, None], [5, 6, 7]
    found = Pipeline(bundle, TorchBackend(lambda graph: loaded, 2), 2).sample(classes, seeds, steps=3)
    expected = Pipeline.load(bundle, "cpu").sample(classes, seeds, steps=3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # the order of FP32 sums


@pytest.mark.slow
def test_verify_saves_states_of_guided_runs_for_quantized_engines(
    build_once: Callable[..., Path], tiny_checkpoint: Path, quantize_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    engines = EngineOptions(batch=(1, 3), compute_capabilities=(86,))
    options = {"sparsity": (0.5,), "quantize": quantize_tiny("int8"), "engines": engines}
    bundle = build_once("tiny-int8-engines", tiny_checkpoint, **options)
    parity = verify(bundle, times=TIMES, save_polygraphy=tmp_path)
    least = Bundle.open(bundle).manifest.quantization.gates.cosine  # type: ignore[union-attr]
    assert len(parity.commands) == 3
    for command in parity.commands:
        assert command.endswith(f"--compare cosine_similarity --cosine-similarity-threshold {least:g}")
        assert f"CosineSimilarityCompareFunc(cosine_similarity_threshold={{'': {least:g}}})" in script_of(command)
    for rows in (1, 3):
        feeds = load_json(str(tmp_path / f"guided-16-8-{rows}-inputs.json"))
        assert {feed["x"].shape[0] for feed in feeds} == {rows}
        spread = [float(feed["x"].std()) for feed in feeds]
        assert min(spread) < 0.9 * max(spread)  # states along a run, not noise alone
