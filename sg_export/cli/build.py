"""`sg-export build`."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sg_export.cli.errors import Command
from sg_export.cli.options import (
    ENGINES,
    QUANTIZATION,
    RUNS,
    GuidanceChoice,
    ModelSource,
    PartChoice,
    QuantizationChoice,
    TargetChoice,
    guidance_options,
    model_options,
    part_options,
    quantization_options,
    refuse_given,
    target_options,
)
from sg_export.cli.output import log_details, progress

if TYPE_CHECKING:
    from sg_runtime.bundle import Bundle
    from sg_runtime.manifest import EngineFacts


@click.command(
    cls=Command,
    sections={
        "Model": model_options.names,
        "Parts": part_options.names,
        "Guidance and sampling": (*guidance_options.names, "steps"),
        "Precision": ("precision", "base_precision"),
        "Quantization, with --precision int8 or fp8": quantization_options.names,
        "Targets": ("target", "batch", "opset"),
        "Engines": (*ENGINES, "explain_cache"),
    },
)
@click.argument("model", required=False)
@guidance_options
@click.option("--steps", type=click.IntRange(min=1), help="Default sampling steps.  [default: 40; 28 for PRX]")
@model_options
@part_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8"]),
    default="fp32",
    show_default=True,
    help="Type of the matmuls and of attention; other operators stay in FP32. int8 and fp8 quantize the matmuls of "
    "layers; the rest has the base precision.",
)
@click.option(
    "--base-precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Type of the matmuls that int8 and fp8 do not quantize.  [default: fp32 for ONNX graphs, fp16 for engines]",
)
@quantization_options
@target_options
@click.option(
    "--explain-cache",
    is_flag=True,
    help="Report for every engine whether it is in the cache, and otherwise what differs.",
)
@click.option("--opset", type=click.IntRange(min=20, max=22), default=20, show_default=True, help="ONNX opset.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: MODEL-bundle]")
@click.option("--force", is_flag=True, help="Replace an existing bundle that holds only its own files.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def build(
    model: str | None,
    guidance: GuidanceChoice,
    steps: int | None,
    source: ModelSource,
    chosen_parts: PartChoice,
    precision: Any,
    base_precision: Any,
    quantization: QuantizationChoice,
    targets: TargetChoice,
    explain_cache: bool,
    opset: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile MODEL into a bundle.

    MODEL is a checkpoint (PyTorch, safetensors), a folder of diffusers with a PRX, or the name of a
    reference model. The default is the reference model glyphs. Text encoder and decoder of a folder
    become parts of the bundle; --vae adds a decoder to a model of classes. ONNX checks every graph,
    and ONNX Runtime runs it once for a comparison with PyTorch. Engines of earlier builds come from
    a cache, $SG_EXPORT_CACHE or sg-export in the user's cache folder.

    \b
    Examples:
      sg-export build --sparsity 0.5
      sg-export build latest.pt --route 2-24 --sparsity 0.9 --strong-sparsity 0.5
      sg-export build --target tensorrt-rtx --precision fp16 --sm 8.9
      sg-export build --target onnxruntime-cuda --precision fp16 --batch 1
      sg-export build --sparsity 0.5 --precision int8
      sg-export build prx-512-t2i-sft --route 2-12 --size 512x768
      sg-export build latest.pt --vae sd-vae-ft-ema
      sg-export build glyphs --weak-checkpoint glyphs-early --schedule cosine \\
        --sparsity 0.6 --sparsity 0.3 --sparsity 0
    """
    from sg_export.compiler import compile
    from sg_export.options.compile import CompileOptions
    from sg_export.packing.pairs import skipped_pairs
    from sg_export.reference import DEFAULT_REFERENCE
    from sg_runtime.manifest import adapter, size_text

    if model is None:
        model = DEFAULT_REFERENCE
        if not quiet:
            click.echo(f"no MODEL given: building the reference model {model}", err=True)
    quantize = None
    if precision in ("int8", "fp8"):
        if quantization.calibration is not None or quantization.calib_data is not None:
            refuse_given(RUNS, "only if ranges are measured on runs, without --calibration and --calib-data")
        quantize = quantization.options(precision)
        precision = base_precision or ("fp32" if "onnxruntime" in targets.target else "fp16")
    else:
        refuse_given(QUANTIZATION, f"only with --precision int8 or fp8, found {precision}")
    onnx_target, engines = targets.onnx_target, targets.engines()
    options = CompileOptions(
        output=output or Path(f"{_name_of(model)}-bundle"),
        **{field.name: getattr(guidance, field.name) for field in fields(guidance)},
        steps=steps,
        precision=precision,
        batch=targets.batch[0] if targets.batch and engines is None else None,
        onnx_target=onnx_target,
        engines=engines,
        quantize=quantize,
        opset=opset,
        weights=source.weight_set,
        overrides=source.overrides_of_first,
        sizes=source.size[1:],
        **{field.name: getattr(chosen_parts, field.name) for field in fields(chosen_parts)},
        force=force,
    )
    if not options.has_onnx and not quiet:
        click.echo(
            "engines run only on the GPUs that they are for, and the ONNX graphs are not kept: give --keep-onnx to "
            "verify and sample the bundle here",
            err=True,
        )
    with progress(quiet) as report, log_details(explain_cache):
        bundle = compile(model, options, report)
    if as_json:
        click.echo(adapter().dump_json(bundle.manifest, indent=1).decode())
    elif not quiet:
        for strong, weak in skipped_pairs(options, bundle.manifest):
            click.echo(f"skipped the pair {strong:g}/{weak:g}: its weak branch is not sparser", err=True)
        for engine in bundle.manifest.engines_of_parts:
            _echo_engine(bundle, engine)
        _echo_quantization(bundle)
        size = sum(file.size for file in bundle.manifest.files.values())
        manifest = bundle.manifest
        count = f"{len(manifest.graphs_of_parts)} graphs"
        count += f", {len(manifest.engines_of_parts)} engines" * bool(options.libraries)
        if manifest.sizes:
            count += f" for {', '.join(size_text(view.model.size) for view in manifest.views)}"
        click.echo(f"{bundle.path}: {count}, {size / 1e6:.1f} MB")


def _name_of(model: str) -> str:
    """Return the name of a checkpoint without its ending; a folder has none."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.stem


def _echo_quantization(bundle: "Bundle") -> None:
    plan = bundle.manifest.quantization
    if plan is None:
        return
    high = [layer.name for layer in plan.layers if not layer.quantized]
    worst = max(plan.quality, key=lambda quality: quality.guided)
    click.echo(
        f"{plan.type}: {len(plan.layers) - len(high)} of {len(plan.layers)} layers; guided prediction within "
        f"{worst.guided:.2%} of FP32 at every time; complete runs within {plan.runs:.2%} (two FP32 runs with "
        f"different kept tokens: {plan.mask_noise:.1%})"
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
