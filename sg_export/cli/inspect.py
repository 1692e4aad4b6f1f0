"""`sg-export inspect`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sg_export.cli.base import Command, model_options, print_table

if TYPE_CHECKING:
    from sg_export.loading import LoadedModel
    from sg_runtime.bundle import Bundle


@click.command(cls=Command)
@click.argument("path")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, weights: Any, route: Any, prediction: Any, heads: int | None, as_json: bool) -> None:
    """Show what a checkpoint or a bundle is, and what its graphs cost.

    PATH is a bundle, a checkpoint, or the name of a reference model. Costs are counted from the graphs, for one image.

    \b
    Examples:
      sg-export inspect glyphs-bundle
      sg-export inspect latest.pt --route 2-24 --prediction flow --json
    """
    if Path(path).is_dir():
        from sg_runtime.bundle import Bundle

        bundle = Bundle.open(path)
        if as_json:
            click.echo(json.dumps(asdict(bundle.manifest), indent=1))
        else:
            _print_bundle(bundle)
    else:
        from sg_export.checkpoint import Overrides
        from sg_export.loading import load_model

        loaded = load_model(path, weights=weights, overrides=Overrides(route, heads, prediction))
        if as_json:
            click.echo(json.dumps({"model": asdict(loaded.facts), "source": asdict(loaded.source)}, indent=1))
        else:
            _print_checkpoint(loaded)


def _model_rows(model: Any) -> list[tuple[str, str]]:
    shape = f"{model.image_size}×{model.image_size}×{model.channels}"
    names = "" if model.class_names is None else f", {model.class_names[0]} to {model.class_names[-1]}"
    return [
        ("family", model.family),
        ("prediction", model.prediction),
        ("image", f"{shape} {model.space}s in {model.tokens} tokens, patch {model.patch}"),
        (
            "network",
            f"{model.depth} blocks, width {model.width}, {model.heads} heads, {model.parameters / 1e6:.1f} M weights",
        ),
        (
            "route",
            "unknown: give --route" if model.route is None else f"blocks {model.route.start} to {model.route.end}",
        ),
        ("classes", f"{model.num_classes}{names}"),
    ]


def _print_checkpoint(loaded: "LoadedModel") -> None:
    source = loaded.source
    rows = [("checkpoint", source.file), ("weights", source.weights), ("SHA-256", source.sha256)]
    print_table("", ("", source.name), rows + _model_rows(loaded.facts))
    if loaded.facts.route is not None:
        levels = [loaded.level(sparsity) for sparsity in (0.0, 0.25, 0.5, 0.75, 0.9)]
        print_table("Tokens kept", ("sparsity", "tokens"), [(level.sparsity, level.keep) for level in levels])


def _print_bundle(bundle: "Bundle") -> None:
    manifest = bundle.manifest
    plan, sampling = manifest.guidance, manifest.sampling
    rates = f", sparsity {plan.strong.sparsity:g} strong and {plan.weak.sparsity:g} weak, scale {plan.scale:g}"
    size = sum(file.size for file in manifest.files.values())
    rows = [
        *_model_rows(manifest.model),
        (
            "guidance",
            plan.mode + (rates if plan.mode == "sg" else f", scale {plan.scale:g}" if plan.mode == "cfg" else ""),
        ),
        ("sampling", f"{sampling.steps} {sampling.sampler} steps"),
        ("graphs", f"{manifest.precision}, opset {manifest.opset}, batch {manifest.batch or 'symbolic'}"),
        ("runs on", "ONNX Runtime, CPU"),
        (
            "source",
            f"{manifest.source.file}, {manifest.source.weights} weights, SHA-256 {manifest.source.sha256[:12]}…",
        ),
        ("size", f"{size / 1e6:.1f} MB, built by {manifest.created_by}"),
    ]
    print_table("", ("", str(bundle.path)), rows)
    graphs = [
        (
            Path(graph.file).stem,
            "/".join(f"{level.sparsity:g}" for level in graph.levels) or None,
            graph.cost.linear_macs / 1e9,
            graph.cost.attention_macs / 1e9,
            graph.cost.weight_bytes / 1e6,
            graph.parity,
        )
        for graph in manifest.graphs
    ]
    columns = ("graph", "sparsity", "linear GMAC", "attention GMAC", "weights MB", "relative L2 to PyTorch")
    print_table("Graphs, per image (condition: per row)", columns, graphs)
