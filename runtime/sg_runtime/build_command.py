"""Derive from a manifest the command that rebuilds its bundle."""

import shlex
from typing import get_args

from sg_runtime.manifest import ENGINE_TARGETS, OF_TEXT, PARTS, UPSTREAM_SUBSET, Manifest, OnnxTarget, Text, size_text

USUAL_OPSET = 20
"""Default ONNX opset of `sg-export build`."""


def model_command(manifest: Manifest, *options: str) -> str:
    """Return the `sg-export build …` command for the bundle's model with these options.

    It states the facts of the model that its checkpoint may lack.
    """
    return shlex.join(["sg-export", "build", manifest.source.name, *_model_words(manifest), *options])


def build_command(
    manifest: Manifest, output: str, *, target: str | None = None, sm: int | None = None, batch: int | None = None
) -> str:
    """Return the `sg-export build …` command for a bundle like this one.

    The command overwrites an existing bundle at `output`. With other targets than the bundle's, it
    writes a new bundle next to it, which has the name of the target at its end.
    target: build target; by default the bundle's targets.
    sm: compute capability to build engines for, 86 for 8.6; by default the bundle's.
    batch: batch size that gets an engine profile in addition to the bundle's.
    """
    plan, source = manifest.guidance, manifest.source
    guided = [graph.levels for graph in manifest.graphs if graph.kind == "guided"]
    singles = [graph.levels for graph in manifest.graphs if graph.kind in ("dense", "sparse")]
    words = ["sg-export", "build", source.name]
    if manifest.weak_source is not None:
        words += ["--weak-checkpoint", manifest.weak_source.name]
    elif plan.mode != "sg":
        words += ["--guidance", plan.mode]
    strong = [plan.strong, *(levels[0] for levels in guided)]
    weak = [plan.weak, *(levels[1] for levels in guided)]
    if manifest.weak_source is not None:
        strong += [g.levels[0] for g in manifest.graphs if g.levels and g.network == "main"]
        weak += [g.levels[0] for g in manifest.graphs if g.levels and g.network == "weak"]
    elif plan.row.branches == 1:
        strong += [levels[0] for levels in singles]
    ends = ((strong, plan.strong_last, "--strong-sparsity"), (weak, plan.weak_last, "--sparsity"))
    for levels, last, option in ends[: 1 if plan.row.weak_level == "same" else 2]:
        rates = list(dict.fromkeys(level.sparsity for level in levels if level != last))
        rates += [last.sparsity] if last is not None else []
        words += [word for rate in rates for word in (option, number_text(rate))]
    if plan.strong_last is not None or plan.weak_last is not None:
        words += ["--schedule", "cosine"]
    scales = [scale for scale in (plan.scale, plan.scale_last) if scale is not None]
    words += ["--scale", ":".join(map(number_text, scales))]
    if plan.interval is not None:
        words += ["--interval", *map(number_text, plan.interval)]
    words += [] if plan.subset == UPSTREAM_SUBSET.get(manifest.model.family) else ["--subset", plan.subset]
    words += _model_words(manifest)
    words += _part_words(manifest, target)
    precision = "fp32" if target == "onnxruntime" else "fp16" if sm == 75 else manifest.precision
    words += ["--steps", str(manifest.sampling.steps), "--precision", *_precision_words(manifest, precision)]
    words += ["--opset", str(manifest.opset)] if manifest.opset != USUAL_OPSET else []
    words += _target_words(manifest, target, sm, batch)
    if target is None or [target] == _targets(manifest):
        return shlex.join([*words, "--output", output, "--force"])
    return shlex.join([*words, "--output", f"{output.rstrip('/')}-{target}"])


def _targets(manifest: Manifest) -> list[str]:
    """Return the build targets of the bundle; ONNX graphs next to engines are none."""
    return sorted({ENGINE_TARGETS[engine.library] for engine in manifest.engines}) or [manifest.onnx_target]


def _model_words(manifest: Manifest) -> list[str]:
    """Return the facts of the model as options; none for a reference model."""
    source, model = manifest.source, manifest.model
    if source.reference is not None:
        return []
    route = [] if model.route is None else ["--route", str(model.route)]
    option = "--weights" if source.weights in ("ema", "model") else "--key"
    weights = [] if source.weights == "bare" else [option, source.weights]
    facts = [*route, "--prediction", model.prediction, "--heads", str(model.heads), *weights]
    if isinstance(model.conditions, Text) and model.picture is not None:
        facts += [word for view in manifest.views for word in ("--size", size_text(view.model.size))]
        facts += ["--text-tokens", str(model.conditions.tokens)]
    return facts


def _part_words(manifest: Manifest, target: str | None) -> list[str]:
    """Return the parts, and their folders if these are not that of the checkpoint.

    The text encoder keeps its precision if the target stays.
    """
    text, decoder, given = manifest.text, manifest.decoder, manifest.source.name
    words = []
    if isinstance(manifest.model.conditions, Text) and len(manifest.parts) < len(PARTS) - 1:
        words += ["--parts", ",".join(part for part in PARTS if part == "step" or part in manifest.parts)]
    if text is not None:
        words += [] if text.source.name == given else ["--pipeline", text.source.name]
        words += [] if target is not None else ["--text-precision", text.precision]
        given = text.source.name
    if decoder is not None:
        words += [] if decoder.source.name == given else ["--vae", decoder.source.name]
    return words


def _precision_words(manifest: Manifest, base: str) -> list[str]:
    """Return the precision and, if the bundle is quantized, the quantization options."""
    plan = manifest.quantization
    if plan is None:
        return [base]
    excluded = [word for layer in plan.layers if layer.reason == "excluded" for word in ("--exclude", layer.name)]
    gates = ["--gate-cosine", number_text(plan.gates.cosine), "--gate-guided", number_text(plan.gates.guided)]
    allowed = [] if plan.passed else ["--allow-quality-loss"]
    if isinstance(manifest.model.conditions, Text) and all(layer.reason != OF_TEXT for layer in plan.layers):
        excluded.append("--quantize-text")
    return [plan.type, "--base-precision", base, "--method", plan.method, *excluded, *gates, *allowed]


def number_text(number: float) -> str:
    """Return the short form of a number, or all its digits if the short form changes the value."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _target_words(manifest: Manifest, target: str | None, sm: int | None, batch: int | None) -> list[str]:
    """Return the options for targets, GPUs and batch sizes."""
    engines = manifest.engines
    onnx = target or (manifest.onnx_target if not engines else None)
    if onnx in get_args(OnnxTarget):
        named = [] if onnx == "onnxruntime" else ["--target", str(onnx)]
        return [*named, *([] if manifest.batch is None else ["--batch", str(manifest.batch)])]
    targets = [target] if target else _targets(manifest)
    words = [word for name in targets for word in ("--target", name)]
    if "tensorrt-rtx" in targets:
        rtx = [engine for engine in engines if engine.library == "tensorrt_rtx"]
        built_for = sorted({number for engine in rtx for number in engine.compute_capabilities})
        words += [word for number in ([sm] if sm else built_for) for word in ("--sm", str(number))]
    words += ["--keep-onnx"] if engines and any(graph.file is not None for graph in manifest.graphs) else []
    sizes = {*manifest.engine_batches(), *(size for size in (batch, manifest.batch) if size)}
    return words + [word for size in sorted(sizes) for word in ("--batch", str(size))]
