"""`sg-export build`."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sg_export.cli.errors import Command
from sg_export.cli.options import INTERVAL, QUANTIZATION, RUNS, model_options, quantization_options, refuse_given
from sg_export.cli.output import messages, progress
from sg_export.cli.types import ComputeCapabilityType, RampType, SizeType

if TYPE_CHECKING:
    from sg_runtime.bundle import Bundle
    from sg_runtime.manifest import EngineFacts


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option(
    "--sparsity",
    type=float,
    multiple=True,
    help="Sparsity of the weak branch, the share of tokens that the route leaves out; repeatable, the first is the "
    "default of runs.  [default: 0.5 for sg]",
)
@click.option(
    "--strong-sparsity",
    type=float,
    multiple=True,
    default=(0.0,),
    help="Sparsity of the strong branch; repeatable.  [default: 0]",
)
@click.option(
    "--scale",
    type=RampType(),
    default=2.0,
    help="Default guidance scale, or FIRST:LAST for one that changes along a cosine.  [default: 2]",
)
@click.option(
    "--guidance",
    type=click.Choice(["sg", "cfg", "cfg+sg", "none"]),
    help="Default guidance, for which guided graphs are built: one for every pair of sparsities that it allows.  "
    "[default: sg]",
)
@click.option(
    "--weak-checkpoint",
    type=click.Path(),
    metavar="PATH",
    help="An earlier checkpoint of the same run as weak branch (AutoGuidance), at any sparsity.",
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine"]),
    default="constant",
    show_default=True,
    help="cosine: sparsities go from the first given to the last over a run, by way of all given.",
)
@INTERVAL
@click.option("--steps", type=click.IntRange(min=1), default=40, show_default=True, help="Default sampling steps.")
@model_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8"]),
    default="fp32",
    show_default=True,
    help="Type of the matrix products and of attention; what needs FP32 beside them stays in it. int8 and fp8: of the "
    "layers' products, over a base precision.",
)
@click.option(
    "--base-precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="What is not in int8 or fp8.  [default: fp32 for ONNX graphs, fp16 for engines]",
)
@quantization_options
@click.option(
    "--target",
    type=click.Choice(["onnxruntime", "tensorrt-rtx", "tensorrt"]),
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    help="ONNX graphs, or engines; repeatable. tensorrt-rtx builds without a GPU, tensorrt (experimental) on the GPU "
    "that the engine is for.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    multiple=True,
    help="Images in one run; repeatable for engines, which have a profile for each.  [default: any for ONNX graphs, 1 "
    "for engines]",
)
@click.option(
    "--sm",
    type=ComputeCapabilityType(),
    multiple=True,
    help="Compute capability of the GPUs that TensorRT-RTX builds for; repeatable.  [default: its own choice: 8.0, "
    "8.6, 8.9, 12.0, 12.1 in version 1.7]",
)
@click.option("--workspace", type=SizeType(), help="Most scratch memory of an engine.  [default: the library's]")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TensorRT's timing cache, read and extended. TensorRT-RTX has none.",
)
@click.option("--keep-onnx", is_flag=True, help="Leave the ONNX graphs of engines in the bundle; verify needs them.")
@click.option("--allow-unfused", is_flag=True, help="Take engines in which attention has no fused kernel.")
@click.option("--explain-cache", is_flag=True, help="Say of every engine whether it was in the cache, or what differs.")
@click.option("--opset", type=click.IntRange(min=20, max=22), default=20, show_default=True, help="ONNX opset.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The bundle's folder.  [default: MODEL-bundle]")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors alone.")
def build(
    model: str | None,
    sparsity: tuple[float, ...],
    strong_sparsity: tuple[float, ...],
    scale: Any,
    guidance: Any,
    weak_checkpoint: str | None,
    schedule: Any,
    interval: tuple[float, float] | None,
    steps: int,
    weights: Any,
    route: Any,
    prediction: Any,
    heads: int | None,
    precision: Any,
    base_precision: Any,
    calibration: Path | None,
    calib_data: Path | None,
    calib_samples: int,
    calib_steps: int,
    calib_seed: int,
    method: Any,
    exclude: tuple[str, ...],
    like: Path | None,
    gate_cosine: float | None,
    gate_guided: float | None,
    allow_quality_loss: bool,
    target: Any,
    batch: tuple[int, ...],
    sm: tuple[int, ...],
    workspace: int | None,
    timing_cache: Path | None,
    keep_onnx: bool,
    allow_unfused: bool,
    explain_cache: bool,
    opset: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile MODEL into a bundle.

    MODEL is a checkpoint (.pt, .pth, .safetensors) or the name of a reference model; without one, the reference model
    glyphs is built. ONNX checks every graph, and ONNX Runtime runs it once beside PyTorch. Engines that were built
    before come from a cache, $SG_EXPORT_CACHE or sg-export in the user's cache folder.

    \b
    Examples:
      sg-export build --sparsity 0.5
      sg-export build latest.pt --route 2-24 --prediction flow --sparsity 0.9 --strong-sparsity 0.5
      sg-export build --sparsity 0.5 --target tensorrt-rtx --precision fp16 --sm 8.9
      sg-export build --sparsity 0.5 --precision int8
      sg-export build glyphs --weak-checkpoint glyphs-early --sparsity 0.6 --sparsity 0.3 --sparsity 0 --schedule cosine
    """
    from sg_calibration.settings import FeedSettings
    from sg_export.checkpoint import Overrides
    from sg_export.compiler import compile
    from sg_export.options.compile import DEFAULT_SPARSITY, CompileOptions
    from sg_export.options.quantize import QUALITY_GATES, QuantizeOptions
    from sg_export.reference import DEFAULT_REFERENCE
    from sg_runtime.manifest import MODES, QualityGates, adapter

    if model is None:
        model = DEFAULT_REFERENCE
        if not quiet:
            click.echo(f"no MODEL given: building the reference model {model}", err=True)
    quantize = None
    if precision in ("int8", "fp8"):
        if calibration is not None or calib_data is not None:
            refuse_given(RUNS, "only where ranges are measured on runs, without --calibration and --calib-data")
        usual = QUALITY_GATES[precision]
        quantize = QuantizeOptions(
            precision,
            method,
            calibration,
            calib_data,
            FeedSettings(calib_samples, calib_steps, calib_seed),
            exclude,
            like,
            QualityGates(
                usual.cosine if gate_cosine is None else gate_cosine,
                usual.guided if gate_guided is None else gate_guided,
            ),
            allow_quality_loss=allow_quality_loss,
        )
        precision = base_precision or ("fp32" if "onnxruntime" in target else "fp16")
    else:
        refuse_given(QUANTIZATION, f"only with --precision int8 or fp8, found {precision}")
    options = CompileOptions(
        output=output or Path(f"{Path(model).stem}-bundle"),
        sparsity=sparsity,
        strong_sparsity=strong_sparsity,
        scale=scale,
        guidance=guidance,
        weak_checkpoint=weak_checkpoint,
        schedule=schedule,
        interval=interval,
        steps=steps,
        precision=precision,
        quantize=quantize,
        targets=target,
        batch=batch,
        compute_capabilities=sm,
        workspace=workspace,
        timing_cache=timing_cache,
        keep_onnx=keep_onnx,
        allow_unfused=allow_unfused,
        opset=opset,
        weights=weights,
        overrides=Overrides(route, heads, prediction),
        force=force,
    )
    with progress(quiet) as report, messages(explain_cache):
        bundle = compile(model, options, report)
    if as_json:
        click.echo(adapter().dump_json(bundle.manifest, indent=1).decode())
    elif not quiet:
        built = [graph.levels for graph in bundle.manifest.graphs if graph.kind == "guided"]
        wanted = itertools.product(strong_sparsity, sparsity or (DEFAULT_SPARSITY,))
        for strong, weak in wanted if MODES[options.mode].weak_level == "sparser" else ():
            if all((strong, weak) != (a.sparsity, b.sparsity) for a, b in built):
                click.echo(f"skipped the pair {strong:g}/{weak:g}: its weak branch is not sparser", err=True)
        for engine in bundle.manifest.engines:
            _echo_engine(bundle, engine)
        _echo_quantization(bundle)
        size = sum(file.size for file in bundle.manifest.files.values())
        count = f"{len(bundle.manifest.graphs)} graphs" + f", {len(bundle.manifest.engines)} engines" * bool(
            options.libraries
        )
        click.echo(f"{bundle.path}: {count}, {size / 1e6:.1f} MB")
        if options.libraries and not keep_onnx and "onnxruntime" not in target:
            click.echo("the engines hold the weights; verify needs the graphs, too: build with --keep-onnx for that")


def _echo_quantization(bundle: "Bundle") -> None:
    plan = bundle.manifest.quantization
    if plan is None:
        return
    high = [layer.name for layer in plan.layers if not layer.quantized]
    worst = max(plan.quality, key=lambda quality: quality.guided)
    click.echo(
        f"{plan.type}: {len(plan.layers) - len(high)} of {len(plan.layers)} layers; guided prediction within "
        f"{worst.guided:.2%} of FP32 at every time; whole runs {plan.runs:.2%} (other token subsets: "
        f"{plan.mask_noise:.1%})"
    )
    for line in [*([f"in {bundle.manifest.precision}: {', '.join(high)}"] if high else []), *plan.remarks]:
        click.echo(line)


def _echo_engine(bundle: "Bundle", engine: "EngineFacts") -> None:
    size = bundle.manifest.files[engine.file].size
    targets = ", ".join(map(str, engine.compute_capabilities))
    parts = [f"{engine.library} {engine.version} for SM {targets}", f"{size / 1e6:.1f} MB"]
    parts += [f"{len(engine.profiles)} profiles" if len(engine.profiles) > 1 else f"profile {engine.profiles[0]}"]
    parts += [f"{engine.fused_attention} fused attentions"] if engine.fused_attention else []
    parts += [f"built in {engine.build_seconds:.1f} s with {engine.build_memory_bytes / 1e9:.2f} GB of memory"]
    click.echo(f"{engine.file}: {', '.join(parts)}")
