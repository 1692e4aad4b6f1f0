r"""Count the cost of a guided step of PRX for several sizes of picture.

    python -m benchmarks.prx_sizes --output benchmarks/results/prx_sizes.json

The shapes are those of the published models of 1.2 billion parameters, with 256 text tokens and
route 2-12. Costs are for one image and one of 28 steps, counted from graphs that are traced without
weights. A pass without this compiler computes modulations and text keys and values again.

sg                the guided graph of dense and routed branch
cfg+sg            the guided graph whose routed branch has the empty prompt
cfg               our guided graph of two dense branches, one with the empty prompt
unguided          our dense graph
cfg, passes       two dense passes, without this compiler
sg, passes        a dense and a routed pass, without this compiler
unguided, passes  a dense pass, without this compiler
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.prx_models import Shape, published, without_memory
from sg_export.adapters import prx
from sg_export.cost.count import count_cost
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_runtime.manifest import Cost, Level

STEPS = 28
SHAPES = {
    "flux VAE, 256²": published(256),
    "flux VAE, 512²": published(512),
    "flux VAE, 1024²": published(1024),
    "DC-AE, 512²": published(512, channels=32),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Cost of one image and step.

    size: autoencoder and size of the picture.
    tokens: number of image tokens.
    way: way of computing the step.
    linear_gmac: 10⁹ multiply-adds with a weight, with those of the hoisted graphs.
    hoisted_gmac: the part of it that is the modulations and the prompt's.
    attention_gmac: 10⁹ multiply-adds of attention.
    weight_gb: 10⁹ bytes of FP32 weights read, with those of the hoisted graphs.
    of_cfg: linear multiply-adds / those of "cfg, passes".
    of_cfg_weights: weight bytes / those of "cfg, passes".
    of_cfg_step: linear multiply-adds without hoisted graphs / those of "cfg"; None for passes.
    """

    size: str
    tokens: int
    way: str
    linear_gmac: float
    hoisted_gmac: float
    attention_gmac: float
    weight_gb: float
    of_cfg: float
    of_cfg_weights: float
    of_cfg_step: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [row for size, shape in SHAPES.items() for row in measure(size, shape)]
    for row in rows:
        costs = f"{row.linear_gmac:8.1f} linear  {row.attention_gmac:7.1f} attention GMAC  {row.weight_gb:6.3f} GB"
        print(f"{row.size:16} {row.way:17} {costs}  {row.of_cfg:.4f}")
    if options.output:
        content = {"machine": machine("torch", "onnx"), "steps": STEPS, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(size: str, shape: Shape) -> list[Row]:
    """Return the costs of all ways for one size."""
    model, facts = without_memory(shape)
    dense, half = (Level(rate, keep_of(facts.tokens, rate)) for rate in (0.0, 0.5))
    specs = {
        "condition": GraphSpec("condition"),
        "prompt": GraphSpec("prompt"),
        "dense": GraphSpec("dense", (dense,)),
        "sparse": GraphSpec("sparse", (half,)),
        "sg": GraphSpec("guided", (dense, half)),
        "cfg+sg": GraphSpec("guided", (dense, half), null_weak=True),
        "cfg": GraphSpec("guided", (dense, dense), null_weak=True),
    }
    models = trace(model, list(specs.values()), facts, 1, DEFAULT_OPSET)
    costs = {name: count_cost(traced.graph) for name, traced in zip(specs, models, strict=True)}
    prompt, condition, each = costs["prompt"], costs["condition"], 1 / STEPS
    ways: dict[str, tuple[list[Cost], list[tuple[Cost, float, float]]]] = {}
    # A run reads the weights of `condition` once for all of its times, and of `prompt` per prompt.
    for way, prompts in (("sg", 1), ("cfg+sg", 2), ("cfg", 2), ("dense", 1)):
        ways[way] = [costs[way]], [(condition, 1, each), (prompt, prompts * each, prompts * each)]
    for way, branches in (("cfg, passes", ["dense"] * 2), ("sg, passes", ["dense", "sparse"]), ("passes", ["dense"])):
        count = len(branches)
        ways[way] = [costs[branch] for branch in branches], [(condition, count, count), (prompt, count, count)]
    ways["unguided"], ways["unguided, passes"] = ways.pop("dense"), ways.pop("passes")
    totals = {way: _total(*parts) for way, parts in ways.items()}
    linear, weights = totals["cfg, passes"][0], totals["cfg, passes"][3]
    return [
        Row(
            size=size,
            tokens=facts.tokens,
            way=way,
            linear_gmac=round(total[0] / 1e9, 3),
            hoisted_gmac=round(total[1] / 1e9, 3),
            attention_gmac=round(total[2] / 1e9, 3),
            weight_gb=round(total[3] / 1e9, 4),
            of_cfg=round(total[0] / linear, 4),
            of_cfg_weights=round(total[3] / weights, 4),
            of_cfg_step=None
            if "passes" in way
            else round((total[0] - total[1]) / (totals["cfg"][0] - totals["cfg"][1]), 4),
        )
        for way, total in totals.items()
    ]


def keep_of(tokens: int, sparsity: float) -> int:
    """Return the number of kept tokens."""
    return prx.kept_count(tokens, sparsity) if sparsity else tokens


def _total(steps: Sequence[Cost], hoisted: Sequence[tuple[Cost, float, float]]) -> tuple[float, float, float, float]:
    """Return all linear multiply-adds, those of hoisted graphs, those of attention, weight bytes.

    hoisted: cost of a graph, its rows per step, and how often its weights are read per step.
    """
    before = sum(cost.linear_macs * rows for cost, rows, _ in hoisted)
    weights = sum(cost.weight_bytes for cost in steps) + sum(cost.weight_bytes * reads for cost, _, reads in hoisted)
    linear, attention = (sum(getattr(cost, name) for cost in steps) for name in ("linear_macs", "attention_macs"))
    return linear + before, before, attention, weights


if __name__ == "__main__":
    main()
