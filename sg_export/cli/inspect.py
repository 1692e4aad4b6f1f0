"""`sg-export inspect`."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sg_export.cli.errors import Command
from sg_export.cli.options import ModelSource, model_options
from sg_export.cli.output import print_table
from sg_export.diffusers_folder import is_folder

if TYPE_CHECKING:
    from sg_export.loading import LoadedModel
    from sg_runtime.bundle import Bundle
    from sg_runtime.manifest import Manifest, ModelFacts


@click.command(cls=Command)
@click.argument("path")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, source: ModelSource, as_json: bool) -> None:
    """Show the facts of a checkpoint or a bundle, and the costs of a bundle's graphs.

    PATH is a bundle, a checkpoint, or the name of a reference model. Costs are counted from the
    graphs, for one image.

    \b
    Examples:
      sg-export inspect glyphs-bundle
      sg-export inspect latest.pt --route 2-24 --json
    """
    if Path(path).is_dir() and not is_folder(Path(path)):
        from sg_runtime.bundle import Bundle

        bundle = Bundle.open(path)
        if as_json:
            from sg_export.cost.step import part_costs, step_costs, step_table
            from sg_runtime.manifest import size_text

            manifest = bundle.manifest
            content = {
                "manifest": asdict(manifest),
                "step_costs": [asdict(cost) for cost in step_costs(manifest)],
                "step_guidance": [asdict(step) for step in step_table(manifest)],
            }
            if manifest.parts:
                content["part_costs"] = [asdict(cost) for cost in part_costs(manifest)]
            if manifest.sizes:
                content["step_costs_by_size"] = {
                    size_text(view.model.size): [asdict(cost) for cost in step_costs(view)] for view in manifest.views
                }
            click.echo(json.dumps(content, indent=1))
        else:
            _print_bundle(bundle)
    else:
        from sg_export.loading import load_model

        loaded = load_model(path, weights=source.weight_set, overrides=source.overrides)
        if as_json:
            click.echo(json.dumps({"model": asdict(loaded.facts), "source": asdict(loaded.source)}, indent=1))
        else:
            _print_checkpoint(loaded)


def _image(model: "ModelFacts") -> str:
    channels, height, width = model.latent
    picture = ""
    if model.picture not in (None, (height, width)):
        picture = f", a picture of {model.picture[0]}×{model.picture[1]}"
    return f"{height}×{width}×{channels} {model.space}s in {model.tokens} tokens, patch {model.patch}{picture}"


def _model_rows(*sizes: "ModelFacts") -> list[tuple[str, str]]:
    """Return the facts of a model.

    sizes: the model at each size.
    """
    model = sizes[0]
    return [
        ("family", model.family),
        ("prediction", model.prediction),
        ("image", "\n".join(map(_image, sizes))),
        (
            "network",
            f"{model.depth} blocks, width {model.width}, {model.heads} heads, {model.parameters / 1e6:.1f} M weights",
        ),
        (
            "route",
            "unknown: give --route" if model.route is None else f"blocks {model.route.start} to {model.route.end}",
        ),
        ("condition", str(model.conditions)),
    ]


def _print_checkpoint(loaded: "LoadedModel") -> None:
    source = loaded.source
    rows = [("checkpoint", source.file), ("weights", source.weights), ("SHA-256", source.sha256)]
    print_table("", ("", source.name), rows + _model_rows(loaded.facts))
    if loaded.facts.route is not None:
        kept = [(sparsity, loaded.kept_count(sparsity)) for sparsity in (0.0, 0.25, 0.5, 0.75, 0.9)]
        print_table("Tokens kept", ("sparsity", "tokens"), kept)


def _print_bundle(bundle: "Bundle") -> None:
    manifest = bundle.manifest
    sampling = manifest.sampling
    size = sum(file.size for file in manifest.files.values())
    rows = [
        *_model_rows(*(view.model for view in manifest.views)),
        ("guidance", str(manifest.guidance)),
        ("sampling", f"{sampling.steps} {sampling.sampler} steps"),
        ("precision", _precision(manifest)),
        ("graphs", f"opset {manifest.opset}, batch {manifest.batch or 'symbolic'}"),
        ("runs on", _runs_on(manifest)),
        *(
            (name, f"{source.file}, {source.weights} weights, SHA-256 {source.sha256[:12]}…")
            for name, source in (("source", manifest.source), ("weak source", manifest.weak_source))
            if source is not None
        ),
        *_part_rows(manifest),
        ("size", f"{size / 1e6:.1f} MB, built by {manifest.created_by}"),
    ]
    print_table("", ("", str(bundle.path)), rows)
    _print_schedule(manifest)
    for view in manifest.views:
        _print_costs(view)
    if manifest.parts:
        _print_parts(manifest)
    graphs = [
        (
            graph.name,
            "/".join(f"{level.sparsity:g}" for level in graph.levels) or None,
            graph.cost.linear_macs / 1e9,
            graph.cost.attention_macs / 1e9,
            graph.cost.weight_bytes / 1e6,
            graph.cost.activation_bytes / 1e6,
            graph.parity,
        )
        for graph in manifest.graphs_of_parts
    ]
    _print_engines(bundle)
    _print_quantization(manifest)
    columns = ("graph", "sparsity", "linear GMAC", "attention GMAC", "weights MB", "activations MB", "L2 to PyTorch")
    print_table("Graphs, per image (condition: per row; text: per prompt)", columns, graphs)


def _part_rows(manifest: "Manifest") -> list[tuple[str, str]]:
    """Return the facts of text encoder and decoder."""
    rows = []
    if manifest.text is not None:
        text = manifest.text
        capped = ", scores capped by a tanh, so no fused attention" if text.capped else ""
        cleaning = "" if text.cleaning == "none" else f", {text.cleaning} cleaning of prompts"
        rows.append(("text encoder", f"{text.source.file}, {text.precision}{cleaning}{capped}"))
    if manifest.decoder is not None:
        rows.append(("decoder", f"{manifest.decoder.source.file}, {manifest.decoder.precision}"))
    return rows


def _print_parts(manifest: "Manifest") -> None:
    from sg_export.cost.step import part_costs

    rows = [
        (
            cost.part,
            cost.runs,
            cost.linear_macs / 1e9,
            cost.attention_macs / 1e9,
            cost.weight_bytes / 1e6,
            f"{cost.share:.1%}",
        )
        for cost in part_costs(manifest)
    ]
    columns = ("part", "runs", "linear GMAC", "attention GMAC", "weights MB", "share of GMAC")
    print_table("Cost of an image with a prompt of its own, by part", columns, rows)


def _precision(manifest: "Manifest") -> str:
    layers = f", FP32 in {', '.join(manifest.fp32_layers)}" if manifest.fp32_layers else ""
    return f"{manifest.precision_name}{layers}"


def _runs_on(manifest: "Manifest") -> str:
    if any(graph.file is None for graph in manifest.graphs):
        return "the engines' GPUs"
    if manifest.onnx_target == "onnxruntime-cuda":
        return "ONNX Runtime, CUDA" + (" or CPU" if manifest.precision == "fp32" else "")
    return "no CPU: BF16" if manifest.precision == "bf16" else "ONNX Runtime, CPU"


def _print_quantization(manifest: "Manifest") -> None:
    """Print which layers are quantized, why the others are not, and the quality at every time."""
    plan = manifest.quantization
    if plan is None:
        return
    rows = [
        (
            layer.name,
            (f"{plan.type} weights" if layer.weight_only else plan.type) if layer.quantized else manifest.precision,
            layer.reason,
            None if layer.sensitivity is None else f"{layer.sensitivity:.3%}",
            layer.bytes_saved / 1e6,
            layer.linear_macs / 1e9,
        )
        for layer in plan.layers
    ]
    columns = ("layer", "type", "why", "distance if only it is quantized", "MB saved", "GMAC")
    seen = f"ranges by {plan.method} of {plan.evaluations} evaluations of {plan.images} images"
    print_table(f"Layers; {seen}", columns, rows)
    quality = [(f"{q.time:.3g}", f"{q.strong:.5f}", f"{q.weak:.5f}", f"{q.guided:.2%}") for q in plan.quality]
    gates = f"gates: cosine {plan.gates.cosine:g}, guided {plan.gates.guided:.0%}"
    click.echo(gates)
    print_table("Distance to FP32", ("t", "strong, cosine", "weak, cosine", "guided"), quality)
    click.echo(
        f"complete runs: {plan.runs:.2%} from FP32; two FP32 runs with different kept tokens: {plan.mask_noise:.2%}"
    )
    for remark in plan.remarks:
        click.echo(remark)


def _print_engines(bundle: "Bundle") -> None:
    rows = [
        (
            Path(engine.file).stem.partition(".")[0],
            f"{engine.library} {engine.version}",
            ", ".join(map(str, engine.compute_capabilities)),
            "\n".join(map(str, engine.profiles)),
            bundle.manifest.files[engine.file].size / 1e6,
            engine.fused_attention,
        )
        for engine in bundle.manifest.engines_of_parts
    ]
    if rows:
        print_table("Engines", ("engine", "built by", "for SM", "profiles", "MB", "fused attentions"), rows)


def _print_schedule(manifest: "Manifest") -> None:
    """Print the sparsities and scales over a default run, unless all evaluations have the same."""
    from sg_export.cost.step import step_table

    table = step_table(manifest)
    if len(set(table)) == 1:
        return
    rows = []
    groups = itertools.groupby(enumerate(table), key=lambda item: (item[1].strong, item[1].weak))
    for (strong, weak), members in groups:
        (first, start), *others = members
        last, end = others[-1] if others else (first, start)
        scale = f"{start.scale:.4g}" if start.scale == end.scale else f"{start.scale:.4g} to {end.scale:.4g}"
        rows.append(
            (
                f"{first}" if first == last else f"{first}-{last}",
                f"{strong.sparsity:g}",
                None if weak is None else f"{weak.sparsity:g}",
                None if weak is None else scale,
            )
        )
    print_table("Guidance over a default run", ("evaluations", "strong", "weak", "scale"), rows)


def _print_costs(manifest: "Manifest") -> None:
    from sg_export.cost.step import step_costs
    from sg_runtime.manifest import size_text

    costs = step_costs(manifest)
    published = any(cost.published is not None for cost in costs)
    rows = []
    for cost in costs:
        row = [
            cost.way,
            cost.linear_macs / 1e9,
            cost.condition_macs / 1e9,
            (cost.linear_macs + cost.condition_macs) / 1e9,
            cost.attention_macs / 1e9,
            cost.weight_bytes / 1e6,
            cost.condition_bytes / 1e6,
            (cost.weight_bytes + cost.condition_bytes) / 1e6,
            cost.activation_bytes / 1e6,
        ]
        rows.append([*row, *([cost.published] if published else [])])
    columns = ["", "linear", "condition", "sum", "attention", "weights", "condition", "sum", "activations"]
    units = ["", *["GMAC"] * 4, *["MB"] * 4]
    heads = [f"{name}\n{unit}" for name, unit in zip(columns, units, strict=True)]
    steps = f"{manifest.sampling.steps} {manifest.sampling.sampler} steps"
    at = f" at {size_text(manifest.model.size)}" if manifest.sizes else ""
    print_table(
        f"Cost of an evaluation{at}, per image, mean over {steps}", heads + ["published\nGMAC"] * published, rows
    )
