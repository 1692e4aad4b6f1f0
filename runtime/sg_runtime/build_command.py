"""The command that builds a bundle again, from what its manifest says."""

import shlex

from sg_runtime.manifest import ENGINE_TARGETS, Manifest

USUAL_OPSET = 20
"""What `sg-export build` takes where none is given."""


def build_command(
    manifest: Manifest, output: str, *, target: str | None = None, sm: int | None = None, batch: int | None = None
) -> str:
    """`sg-export build …` for a bundle like this one at `output`, in place of what is there.

    target: in place of the bundle's own. sm: the GPU to build engines for, 86 for 8.6, in place of the bundle's. batch:
    an image count for which engines have a profile, too.
    """
    plan, source, model = manifest.guidance, manifest.source, manifest.model
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
        words += [word for rate in rates for word in (option, _text(rate))]
    if plan.strong_last is not None or plan.weak_last is not None:
        words += ["--schedule", "cosine"]
    words += ["--scale", _text(plan.scale) + ("" if plan.scale_last is None else f":{_text(plan.scale_last)}")]
    if plan.interval is not None:
        words += ["--interval", *map(_text, plan.interval)]
    if source.reference is None:
        words += ["--route", str(model.route)] if model.route is not None else []
        words += ["--prediction", model.prediction, "--heads", str(model.heads)]
        words += ["--weights", source.weights] if source.weights != "bare" else []
    precision = "fp32" if target == "onnxruntime" else "fp16" if sm == 75 else manifest.precision
    words += ["--steps", str(manifest.sampling.steps), "--precision", *_precision_words(manifest, precision)]
    words += ["--opset", str(manifest.opset)] if manifest.opset != USUAL_OPSET else []
    words += _target_words(manifest, target, sm, batch)
    return shlex.join([*words, "--output", output, "--force"])


def _precision_words(manifest: Manifest, base: str) -> list[str]:
    """The precision, and what goes with one that is quantized."""
    plan = manifest.quantization
    if plan is None:
        return [base]
    excluded = [word for layer in plan.layers if layer.reason == "excluded" for word in ("--exclude", layer.name)]
    gates = ["--gate-cosine", _text(plan.gates.cosine), "--gate-guided", _text(plan.gates.guided)]
    allowed = [] if plan.passed else ["--allow-quality-loss"]
    return [plan.type, "--base-precision", base, "--method", plan.method, *excluded, *gates, *allowed]


def _text(number: float) -> str:
    """A number as a user writes it, or with all digits where that is not the same number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _target_words(manifest: Manifest, target: str | None, sm: int | None, batch: int | None) -> list[str]:
    """Targets, GPUs and batch sizes."""
    engines = manifest.engines
    if target == "onnxruntime" or (target is None and not engines):
        return [] if manifest.batch is None else ["--batch", str(manifest.batch)]
    targets = [target] if target else sorted({ENGINE_TARGETS[engine.library] for engine in engines})
    words = [word for name in targets for word in ("--target", name)]
    if "tensorrt-rtx" in targets:
        rtx = [engine for engine in engines if engine.library == "tensorrt_rtx"]
        built_for = sorted({number for engine in rtx for number in engine.compute_capabilities})
        words += [word for number in ([sm] if sm else built_for) for word in ("--sm", str(number))]
    words += ["--keep-onnx"] if engines and any(graph.file is not None for graph in manifest.graphs) else []
    sizes = {*manifest.engine_batches(), *(size for size in (batch, manifest.batch) if size)}
    return words + [word for size in sorted(sizes) for word in ("--batch", str(size))]
