"""The command that rebuilds a bundle requests exactly what the bundle holds."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from sg_export.checkpoint import Overrides
from sg_export.cli import main
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.loading import load_model, load_weak
from sg_export.options.compile import CompileOptions
from sg_export.packing.pairs import choose_graphs
from sg_runtime.build_command import USUAL_OPSET, build_command
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.guidance import choose
from sg_runtime.manifest import EngineFacts, Level, Manifest, Profile, read_manifest

BUNDLES = (
    "tiny_bundle",
    "tiny_cfg_bundle",
    "tiny_cfg_sg_bundle",
    "tiny_autoguidance_bundle",
    "tiny_edm_bundle",
    "tiny_cosine_bundle",
    "plain_bundle",
    "engine_bundle",
    "tiny_int8_bundle",
)

Asked = Callable[[str], tuple[str, CompileOptions]]


@pytest.fixture(scope="module")
def plain_bundle(build_once: Callable[..., Path], tiny_checkpoint: Path) -> Path:
    """Return the tiny model without guidance at sparsities 0.25 and 0, next to its checkpoint."""
    options = {"strong_sparsity": (0.25, 0.0), "guidance": "none", "batch": 1, "steps": 7}
    return build_once("plain-bundle", tiny_checkpoint, **options)


@pytest.fixture
def manifest(request: pytest.FixtureRequest) -> Manifest:
    """Return the manifest of the bundle that a test names, by default the tiny bundle."""
    return Bundle.open(request.getfixturevalue(getattr(request, "param", "tiny_bundle"))).manifest


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Return a function that gives the model and the options that a command would compile."""

    def asked(command: str) -> tuple[str, CompileOptions]:
        calls: list[tuple[str, CompileOptions]] = []

        def stop(model: str, options: CompileOptions, report: Any) -> None:
            calls.append((model, options))
            raise UsageError("far enough")

        name, *words = shlex.split(command)
        assert name == "sg-export"
        with monkeypatch.context() as patch:
            patch.setattr("sg_export.compiler.compile", stop)
            result = CliRunner().invoke(main, words)
        assert "far enough" in result.output, result.output
        return calls[0]

    return asked


@pytest.mark.parametrize("manifest", BUNDLES, indirect=True)
def test_build_command_asks_for_the_same_plan_and_graphs(
    manifest: Manifest, asked: Asked, tiny_checkpoint: Path
) -> None:
    model, options = asked(build_command(manifest, "out"))
    assert model == manifest.source.file
    loaded = load_model(tiny_checkpoint.parent / model, weights=options.weights, overrides=options.overrides)
    weak = None
    if options.weak_checkpoint is not None:
        path = tiny_checkpoint.parent / options.weak_checkpoint
        weak = load_weak(path, loaded, options.weights, options.overrides)
    plan, specs = choose_graphs(loaded, weak, options)
    assert (loaded.facts, loaded.source) == (manifest.model, manifest.source)
    assert (None if weak is None else weak.source) == manifest.weak_source
    assert plan == manifest.guidance
    built = [(graph.kind, graph.network, graph.levels, graph.null_weak) for graph in manifest.graphs]
    wanted = [(spec.kind, spec.network, spec.levels, spec.null_weak) for spec in specs]
    assert built == [spec for spec in wanted if not manifest.engines or spec[0] in ("condition", "guided")]


@pytest.mark.parametrize("manifest", BUNDLES, indirect=True)
def test_build_command_asks_for_the_same_sampling_types_and_batch(manifest: Manifest, asked: Asked) -> None:
    _, options = asked(build_command(manifest, "out"))
    assert options.steps == manifest.sampling.steps
    assert options.precision == manifest.precision
    assert options.opset == manifest.opset
    if not manifest.engines:
        assert options.engines is None
        assert options.batch == manifest.batch
    assert options.output == Path("out")
    assert options.force


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
def test_build_command_of_engines_asks_for_the_same_targets(manifest: Manifest, asked: Asked) -> None:
    _, options = asked(build_command(manifest, "out"))
    assert options.libraries == ("tensorrt_rtx",)
    assert options.engines.compute_capabilities == (80, 86, 89, 120, 121)
    assert options.engines.batch == (1,), "the condition graph's 40 rows are not a batch"
    assert not options.engines.keep_onnx


@pytest.mark.parametrize("manifest", ["plain_bundle"], indirect=True)
def test_build_command_that_runs_makes_the_same_bundle(
    manifest: Manifest, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    result = CliRunner().invoke(main, shlex.split(build_command(manifest, str(tmp_path / "out")))[1:])
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "out/manifest.json") == manifest


def test_build_command_is_one_line_that_a_shell_takes(manifest: Manifest) -> None:
    """The command names every option, so it describes the bundle."""
    assert build_command(manifest, "out") == (
        "sg-export build tiny.safetensors --strong-sparsity 0 --strong-sparsity 0.25 --sparsity 0.5 --scale 2 "
        "--route 1-1 --prediction flow --heads 2 --steps 40 --precision fp32 --output out --force"
    )


def test_build_command_quotes_names_with_spaces(manifest: Manifest, asked: Asked) -> None:
    source = replace(manifest.source, file="my model's.safetensors")
    command = build_command(replace(manifest, source=source), "my bundles/one; two")
    model, options = asked(command)
    assert model == "my model's.safetensors"
    assert options.output == Path("my bundles/one; two")


def test_build_command_of_a_reference_model_names_it_alone(manifest: Manifest, asked: Asked) -> None:
    """The reference model's own facts hold its route, heads and prediction."""
    command = build_command(replace(manifest, source=replace(manifest.source, reference="glyphs")), "out")
    model, options = asked(command)
    assert model == "glyphs"
    assert not {"--route", "--heads", "--prediction", "--weights"} & set(shlex.split(command))
    assert options.weights is None


@pytest.mark.parametrize("weights", ["ema", "model", "nets.generator"])
def test_build_command_names_the_weights_of_a_file_that_has_two(manifest: Manifest, asked: Asked, weights: Any) -> None:
    _, options = asked(build_command(replace(manifest, source=replace(manifest.source, weights=weights)), "out"))
    assert options.weights == weights


@pytest.mark.parametrize("manifest", ["plain_bundle"], indirect=True)
def test_build_command_of_a_model_without_a_route_names_none(manifest: Manifest, asked: Asked) -> None:
    _, options = asked(build_command(replace(manifest, model=replace(manifest.model, route=None)), "out"))
    assert options.overrides.route is None


@pytest.mark.parametrize("number", [0.0, 1 / 3, 1e-7, 1234567.5])
def test_build_command_has_all_digits_of_scale_and_interval(manifest: Manifest, asked: Asked, number: float) -> None:
    plan = replace(manifest.guidance, scale=-number, scale_last=number, interval=(number, 2 * number))
    _, options = asked(build_command(replace(manifest, guidance=plan), "out"))
    assert options.scale == (-number, number)
    assert options.interval == (number, 2 * number)


def test_build_command_has_all_digits_of_sparsities(manifest: Manifest, asked: Asked) -> None:
    plan = replace(manifest.guidance, weak=Level(2 / 3, 5))
    assert asked(build_command(replace(manifest, guidance=plan), "out"))[1].sparsity == (2 / 3, 0.5)


def test_build_command_of_another_opset_names_it(manifest: Manifest, asked: Asked) -> None:
    assert asked(build_command(replace(manifest, opset=22), "out"))[1].opset == 22
    assert USUAL_OPSET == DEFAULT_OPSET


def engines(manifest: Manifest, **changes: Any) -> Manifest:
    """Return the manifest with replaced facts of its engines."""
    return replace(manifest, engines=tuple(replace(engine, **changes) for engine in manifest.engines))


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
def test_build_command_of_several_batches_names_each_once(manifest: Manifest, asked: Asked) -> None:
    profiles = tuple(Profile(batch, keep) for batch in (4, 1) for keep in ((16, 8), (12, 8)))
    condition, guided = manifest.engines
    _, options = asked(build_command(replace(manifest, engines=(condition, replace(guided, profiles=profiles))), "out"))
    assert options.engines.batch == (1, 4)


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
def test_build_command_for_a_gpu_names_it_in_place_of_the_bundles(manifest: Manifest, asked: Asked) -> None:
    _, options = asked(build_command(manifest, "out", sm=75))
    assert options.engines.compute_capabilities == (75,)
    assert options.libraries == ("tensorrt_rtx",)


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
def test_build_command_for_tensorrt_names_no_gpu(manifest: Manifest, asked: Asked) -> None:
    """TensorRT builds for the GPU on which it runs."""
    _, options = asked(build_command(manifest, "out", target="tensorrt", sm=90))
    assert options.libraries == ("tensorrt",)
    assert options.engines.compute_capabilities == ()
    assert options.engines.batch == (1,)


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
def test_build_command_of_tensorrt_engines_asks_for_these(manifest: Manifest, asked: Asked) -> None:
    _, options = asked(build_command(engines(manifest, library="tensorrt", compute_capabilities=(90,)), "out"))
    assert options.libraries == ("tensorrt",)
    assert options.engines.compute_capabilities == ()


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
def test_build_command_of_both_libraries_asks_for_both(manifest: Manifest, asked: Asked) -> None:
    other = engines(manifest, library="tensorrt", compute_capabilities=(90,))
    _, options = asked(build_command(replace(manifest, engines=manifest.engines + other.engines), "out"))
    assert options.libraries == ("tensorrt", "tensorrt_rtx")
    assert options.engines.compute_capabilities == (80, 86, 89, 120, 121), "9.0 belongs to TensorRT"


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
def test_build_command_of_engines_beside_graphs_keeps_these(manifest: Manifest, asked: Asked) -> None:
    graphs = tuple(replace(graph, file="graphs/one.onnx") for graph in manifest.graphs)
    kept = replace(manifest, graphs=graphs)
    assert asked(build_command(kept, "out"))[1].has_onnx
    assert asked(build_command(kept, "out", target="onnxruntime"))[1].engines is None


@pytest.mark.parametrize("manifest", ["engine_bundle"], indirect=True)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_build_command_for_the_cpu_is_in_fp32(manifest: Manifest, asked: Asked, precision: Any) -> None:
    _, options = asked(build_command(replace(manifest, precision=precision), "out", target="onnxruntime"))
    assert (options.engines, options.precision) == (None, "fp32")
    assert options.batch is None


def test_build_command_of_graphs_for_cuda_asks_for_them_or_for_any_provider(manifest: Manifest, asked: Asked) -> None:
    cuda = replace(manifest, onnx_target="onnxruntime-cuda", precision="bf16", batch=2)
    _, options = asked(build_command(cuda, "out"))
    assert (options.onnx_target, options.precision, options.batch) == ("onnxruntime-cuda", "bf16", 2)
    assert options.force
    _, other = asked(build_command(cuda, "out", target="onnxruntime"))
    assert (other.onnx_target, other.precision, other.batch) == ("onnxruntime", "fp32", 2)
    assert other.output.name == "out-onnxruntime"


@pytest.mark.parametrize("manifest", BUNDLES, indirect=True)
@pytest.mark.parametrize("target", [None, "onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_build_command_for_every_target_parses(manifest: Manifest, target: str | None) -> None:
    _, name, *words = shlex.split(build_command(manifest, "out", target=target))
    main.commands[name].make_context(name, words, parent=click.Context(main))  # raises for a wrong option or value


@pytest.mark.parametrize("manifest", ["tiny_int8_bundle"], indirect=True)
def test_build_command_of_a_quantized_bundle_asks_for_the_same_type_layers_and_base(
    manifest: Manifest, asked: Asked
) -> None:
    plan = manifest.quantization
    assert plan is not None
    quantize = asked(build_command(manifest, "out"))[1].quantize
    assert quantize is not None
    assert (quantize.type, quantize.effective_method, quantize.exclude) == ("int8", "percentile", ("blocks.2.mlp.fc2",))
    assert not quantize.allow_quality_loss
    failed = replace(manifest, quantization=replace(plan, passed=False, type="fp8", method="entropy"))
    _, options = asked(build_command(replace(failed, precision="fp16"), "out"))
    assert options.quantize is not None
    assert (options.precision, options.quantize.type, options.quantize.effective_method) == ("fp16", "fp8", "entropy")
    assert options.quantize.allow_quality_loss


@pytest.mark.parametrize("manifest", ["tiny_int8_bundle"], indirect=True)
def test_build_command_of_a_quantized_bundle_asks_for_the_same_gates(manifest: Manifest, asked: Asked) -> None:
    assert manifest.quantization is not None
    quantize = asked(build_command(manifest, "out"))[1].quantize
    assert quantize is not None
    assert quantize.effective_gates == manifest.quantization.gates


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_build_command_for_another_target_replaces_no_bundle(manifest: Manifest, target: str) -> None:
    end = " --output out/ --force" if target == "onnxruntime" else f" --output out-{target}"
    assert build_command(manifest, "out/", target=target).endswith(end)
    profiles = (Profile(1, (16,)),)
    engine = EngineFacts("dense", "main", False, "engines/e", "tensorrt_rtx", "1.7", (86,), profiles, None, 0.0, 0)
    command = build_command(replace(manifest, engines=(engine,)), "out", target=target)
    assert ("--force" in command) == (target == "tensorrt-rtx")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tiny_bundle", {"sparsity": 0.9}),
        ("tiny_bundle", {"sparsity": 1 / 3}),
        ("tiny_bundle", {"strong_sparsity": 0.1}),
        ("tiny_bundle", {"mode": "cfg", "strong_sparsity": 0.9}),
        ("tiny_bundle", {"mode": "autoguidance"}),
        ("tiny_edm_bundle", {"sparsity": 0.9}),
        ("tiny_autoguidance_bundle", {"sparsity": 0.9}),
        ("plain_bundle", {"mode": "sg"}),
    ],
)
def test_command_in_a_message_of_guidance_parses_and_states_the_model(
    name: str, arguments: dict[str, Any], asked: Asked, request: pytest.FixtureRequest
) -> None:
    manifest = Bundle.open(request.getfixturevalue(name)).manifest
    with pytest.raises(UsageError) as caught:
        choose(manifest, **arguments)
    model, options = asked(str(caught.value).partition("build it with: ")[2])
    assert model == manifest.source.name
    facts = manifest.model
    assert options.overrides == Overrides(facts.route, facts.heads, facts.prediction)
    wanted = {value for option, value in arguments.items() if option != "mode"}
    assert wanted <= {*options.sparsity, *options.strong_sparsity}
