"""Quantization search: ranges, layers that stay in high precision, and quality gates."""

import functools
import logging
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from sg_calibration.feeds import (
    Split,
    collect,
    given_shards,
    identity_of,
    images_of,
    read_shard,
    shard_folders,
    split_of,
)
from sg_calibration.layers import check_names
from sg_calibration.prompts import Prompts
from sg_calibration.ranges import RangeTable, Runs, measure, read_table, write_table
from sg_calibration.settings import LEAST_STRATA, FeedSettings
from sg_export.graph.products import belongs
from sg_export.options.quantize import QuantizeOptions
from sg_export.options.types import BASES
from sg_export.parity.walk import Walk, by_pipeline, judge, run_distance, walk
from sg_export.quantize.gates import gates_failure, gates_hold, gates_remedy, time_ratio
from sg_export.quantize.layers import LayerFacts, quantizable_layers
from sg_export.quantize.rewrite import quantized_pipeline, reference_pipeline
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CalibrationError, GateError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.guidance import built_guidances
from sg_runtime.manifest import (
    MANIFEST_FILE,
    OF_TEXT,
    LayerChoice,
    Precision,
    Quantization,
    QuantizedType,
    Text,
    read_manifest,
)
from sg_runtime.pipeline import Pipeline

LOG = logging.getLogger("sg_export")

Tell = Callable[[str, float | None], None]

MARGIN = 0.9
"""Share of the gates' tolerance that the search may use, as the gates see other images."""

STRATA = LEAST_STRATA


def measure_ranges(
    reference: Bundle,
    feeds: FeedSettings,
    data: Path | None,
    folder: Path | None,
    tell: Tell,
    prompts: Prompts | None = None,
) -> RangeTable:
    """Measure the ranges of a bundle's layers, over all of its sizes.

    data: folder of shards; None to collect shards from guided runs.
    folder: folder that keeps the shards of the guided runs, so that an interrupted collection can
    be resumed; by default a temporary one.
    prompts: see `images_of`.

    If there are several sizes, each has its shards in a folder of its own; see `shard_folders`.
    """
    views = reference.views
    if data is None and prompts is None and isinstance(reference.manifest.model.conditions, Text):
        LOG.warning(
            "calibration on random prompts: ranges of real prompts differ: build with the text encoder, or give `data` "
            "with the embeddings of your prompts"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folders = shard_folders(data or folder or Path(scratch), [view.manifest.model.size for view in views])
        runs = []
        for view, own in zip(views, folders, strict=True):
            pipe, model, guidances = reference_pipeline(view), view.manifest.model, built_guidances(view.manifest)
            identity = identity_of(view.manifest)
            if data is not None:
                paths = given_shards(own)
            else:
                paths = collect(pipe, guidances, feeds, own, identity, lambda stage, k, n: tell(stage, k / n), prompts)
            runs.append(Runs(pipe, guidances, map(functools.partial(read_shard, model=model), paths)))
        return measure(runs, lambda stage: tell(stage, None))


def decide_quantization(
    reference: Bundle,
    options: QuantizeOptions,
    base: Precision,
    fp32_layers: Collection[str],
    tell: Tell,
    prompts: Prompts | None = None,
) -> tuple[Quantization, dict[str, float]]:
    """Choose the layers to quantize and measure the quality of the result.

    Returns the plan, and the ranges of the quantized layers. base, fp32_layers: precision of the
    other layers, see `half.to_half`. prompts: see `images_of`.

    Raises GateError if the gates do not hold. Raises UsageError for an unknown layer, or for a plan
    of another network.
    """
    manifest, pipe = reference.manifest, reference_pipeline(reference)
    known = quantizable_layers(reference)
    check_names("`exclude`", options.exclude, known)
    given = None if options.like is None else _choice_of(options.like, known, options.type)
    if options.table is not None:
        table, digest = read_table(options.table, identity_of(manifest)), sha256_of(options.table)
    else:
        table = measure_ranges(reference, options.feeds, options.data, None, tell, prompts)
        with tempfile.TemporaryDirectory() as scratch:
            write_table(table, Path(scratch) / "table.json")
            digest = sha256_of(Path(scratch) / "table.json")
    ranges = table.ranges(options.effective_method)
    steps = [name for name, facts in known.items() if facts.in_steps]
    if missing := [name for name in steps if name not in ranges]:
        raise CalibrationError(
            f"{options.table}: expected ranges of all {len(steps)} layers of the step graphs, found none of "
            f"{', '.join(missing[:5])}: make the table again with sg-export calibrate"
        )
    makes = functools.partial(quantized_pipeline, reference, options.type, ranges, base=base, fp32_layers=fp32_layers)
    choice = given or _search(pipe, known, options, makes, tell, prompts)
    quantized = [name for name in known if choice[name].quantized]
    tell("measuring the quality of the result", None)
    candidate = makes(quantized)
    judged = walks_of(pipe, "gate", options.gate_images, prompts)
    quality = judge(candidate, judged)
    holds = gates_hold(quality, options.effective_gates)
    if not holds and not options.allow_quality_loss:
        raise GateError(f"{gates_failure(quality, options)}: {gates_remedy(options)}")
    layers = []
    for name, facts in known.items():
        own = choice[name]
        bits = 32 if belongs(f"{name}.weight", tuple(fp32_layers)) else ir.DataType(BASES[base].onnx).bitwidth
        saved = facts.weight_bytes // 32 * (bits - 8) if own.quantized else 0
        weight_only = name not in ranges
        layers.append(
            LayerChoice(name, own.quantized, weight_only, own.reason, own.sensitivity, saved, facts.linear_macs)
        )
    remarks = [] if holds else [f"its gates do not hold: {gates_failure(quality, options)}"]
    ratio = time_ratio(candidate, pipe, judged[0]) if base == "fp32" else None
    if ratio is not None and ratio >= 1:
        remarks.append(f"not faster on this machine's CPU: a guided step takes {ratio:.2f} times as long as in FP32")
    if not quantized:
        remarks.append("not smaller: no layer is quantized")
    result = Quantization(
        type=options.type,
        method=options.effective_method,
        table_sha256=digest,
        images=table.images,
        evaluations=table.evaluations,
        layers=tuple(layers),
        quality=quality,
        runs=run_distance(candidate, judged),
        mask_noise=max(own.mask_noise for own in judged),
        gates=options.effective_gates,
        passed=holds,
        time_ratio=ratio,
        remarks=tuple(remarks),
        prompts=() if prompts is None else split_of("gate", prompts, options.gate_images).texts,
    )
    return result, {name: ranges[name] for name in quantized if name in ranges}


@dataclass(frozen=True, slots=True)
class _Choice:
    """Whether a layer is quantized, and why. The fields are those of LayerChoice."""

    quantized: bool
    reason: str
    sensitivity: float | None


def _search(
    pipe: Pipeline,
    known: Mapping[str, LayerFacts],
    options: QuantizeOptions,
    makes: Callable[[Sequence[str]], Pipeline],
    tell: Tell,
    prompts: Prompts | None,
) -> dict[str, _Choice]:
    """Choose the layers that stay in high precision.

    The most sensitive layers return to high precision first, as few as the gates require on the
    images of the search.
    """
    of_text = [name for name, facts in known.items() if facts.of_text and not options.text]
    open_layers = [name for name in known if name not in (*options.exclude, *of_text)]
    walks = walks_of(pipe, "search", options.search_images, prompts, noise=False)
    sensitivities: dict[str, float] = {}
    for number, name in enumerate(open_layers):
        tell(f"measuring the sensitivity of {name}", number / len(open_layers))
        quality = judge(makes([name]), walks, strata=range(0, STRATA, STRATA // 4))
        sensitivities[name] = max(stratum.guided for stratum in quality)
    worst_first = sorted(open_layers, key=lambda name: -sensitivities[name])

    def passes(returned: int) -> bool:
        tell(f"trying with {returned} layers in high precision", None)
        return gates_hold(judge(makes(worst_first[returned:]), walks), options.effective_gates, MARGIN)

    returned = worst_first[: _least(passes, len(worst_first))]
    choice = {name: _Choice(True, "quantized", sensitivities[name]) for name in open_layers}
    choice |= {name: _Choice(False, "returned by the search", sensitivities[name]) for name in returned}
    choice |= {name: _Choice(False, OF_TEXT, None) for name in of_text}
    return choice | {name: _Choice(False, "excluded", None) for name in options.exclude}


def _choice_of(path: Path, known: Collection[str], kind: QuantizedType) -> dict[str, _Choice]:
    """Return the choice of layers in the bundle at `path`.

    Raises UsageError if the bundle is not quantized to `kind`, or if it has other layers.
    """
    manifest = read_manifest(path / MANIFEST_FILE)
    plan = manifest.quantization
    if plan is None or plan.type != kind:
        raise UsageError(f"`like` {path}: expected a bundle in {kind}, found one in {manifest.precision_name}")
    choice = {layer.name: _Choice(layer.quantized, f"as in {path.resolve().name}", None) for layer in plan.layers}
    if odd := sorted(choice.keys() ^ set(known)):
        raise UsageError(
            f"`like` {path}: expected a bundle with this model's {len(known)} layers, found one of {len(choice)}; "
            f"only one of them has {', '.join(odd[:5])}"
        )
    return choice


def walks_of(
    pipe: Pipeline, split: Split, images: int, prompts: Prompts | None = None, *, noise: bool = True
) -> list[Walk]:
    """Return one walk of the pipeline for each guidance that the bundle has graphs for.

    The images are those of `split`. noise: also measure the mask noise.
    """
    manifest = pipe.bundle.manifest
    own = images_of(split, manifest.model, images, prompts=prompts)
    return [walk(pipe, by_pipeline(pipe), plan, *own, STRATA, noise=noise) for plan in built_guidances(manifest)]


def _least(passes: Callable[[int], bool], most: int) -> int:
    """Return the least number up to `most` that passes, by bisection; `most` if none passes."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low
