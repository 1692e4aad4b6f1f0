"""Write Markdown tables of the cost and the quality of INT8 and FP8.

    python -m benchmarks.quantization_tables

Reads quantization.json and quality_quantized.json in benchmarks/results and writes quantization.md
to the same folder.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TITLES = {"int8": "INT8", "fp8": "FP8", "fp32": "FP32"}


def main() -> None:
    quantization, quality = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("quantization", "quality_quantized")
    )
    sections = ["# INT8 and FP8, measured", _origin(quantization), _methods(quantization["models"])]
    sections += [_default(quantization["models"]), _speed(quantization["models"]), _quality(quality)]
    sections += [_gates(own) for own in quantization["models"]]
    (RESULTS / "quantization.md").write_text("\n\n".join(sections) + "\n")


def _origin(content: dict[str, Any]) -> str:
    machine, setup = content["machine"], content["setup"]
    where = f"{machine['cores']} cores of {machine['processor']}, ONNX Runtime {machine['versions']['onnxruntime']}"
    return (
        f"Measured by `python -m benchmarks.quantization` and `python -m benchmarks.quality_quantized` on {where}. "
        f"The guidance is SG at sparsities 0 and 0.5. The ranges are from {setup['samples']} images. S/2 has random "
        f"weights: its rows show cost and speed, but not the quality of a trained S/2 in eight bits."
    )


def _methods(models: Sequence[dict[str, Any]]) -> str:
    """Return the table of methods with all layers quantized."""
    rows = [
        (own["model"], TITLES[row["type"]], row["method"], f"{row['guided']:.1%}", f"{row['cosine']:.4f}")
        for own in models
        for row in own["methods"]
    ]
    text = (
        "All layers are quantized. The figures are the worst of 25 times. ModelOpt chooses its own operators, "
        "including residual additions."
    )
    columns = ("model", "type", "method", "guided, relative L2", "lowest cosine of a branch")
    return f"## Methods to find ranges\n\n{text}\n\n{table(columns, rows)}"


def _default(models: Sequence[dict[str, Any]]) -> str:
    """Return the table of default builds."""
    rows = []
    for own in models:
        for built in own["default"]:
            high = ", ".join(f"`{name}`" for name in built["high_precision"]) or "–"
            rows.append(
                (
                    own["model"],
                    TITLES[built["type"]],
                    f"{built['layers'] - len(built['high_precision'])} of {built['layers']}",
                    high,
                    f"{max(q['guided'] for q in built['quality']):.1%}",
                    f"{min(min(q['strong'], q['weak']) for q in built['quality']):.4f}",
                    f"{built['runs']:.1%} / {built['mask_noise']:.1%}",
                    f"{built['weights_of_fp32']:.2f}",
                    f"{own['calibration_seconds']:.0f} + {built['seconds']:.0f} s",
                )
            )
    columns = (
        "model",
        "type",
        "layers in eight bits",
        "in FP32",
        "guided, worst time",
        "lowest cosine",
        "complete runs / mask noise",
        "weights / FP32",
        "ranges + build",
    )
    return f"## Default builds\n\n{table(columns, rows)}"


def _speed(models: Sequence[dict[str, Any]]) -> str:
    """Return the table of the time of a guided step on ONNX Runtime's CPU provider."""
    rows = []
    for own in models:
        for row in own["speed"]:
            low, high = row["ratio_quartiles"]
            ratio = f"{row['ratio']:.2f} ({low:.2f}–{high:.2f})" if row["precision"] != "fp32" else "1"
            rows.append((own["model"], row["batch"], TITLES[row["precision"]], f"{row['median_ms']:.1f}", ratio))
    text = (
        "One guided step on ONNX Runtime's CPU provider, with all bundles timed in turn. Figures are medians; "
        "quartiles of the ratio are in parentheses."
    )
    columns = ("model", "images", "type", "ms", "time / FP32")
    return f"## Speed\n\n{text}\n\n{table(columns, rows)}"


def _quality(content: dict[str, Any]) -> str:
    """Return the table of figures of glyphs samples."""
    rows = []
    for row in content["rows"]:
        figures = [
            [seed[name] for seed in row["figures"]] for name in ("accuracy", "frechet_training", "frechet_held_out")
        ]
        (accuracy, spread), *frechet = ((statistics.mean(values), statistics.stdev(values)) for values in figures)
        shown = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in frechet]
        rows.append((row["name"], TITLES[row["precision"]], f"{accuracy:.2%} ± {spread:.2%}", *shown))
    protocol = content["protocol"]
    text = (
        f"{protocol['samples']} samples for each of {protocol['seeds']} seeds, {protocol['steps']} Euler steps. "
        f"Figures are mean ± standard deviation over the seeds."
    )
    columns = ("glyphs", "type", "accuracy", "Fréchet, training fonts", "Fréchet, held-out fonts")
    return f"## Samples\n\n{text}\n\n{table(columns, rows)}"


def _gates(own: dict[str, Any]) -> str:
    """Return the table of a model's default builds at every time."""
    built = own["default"]
    rows = []
    for strata in zip(*(one["quality"] for one in built), strict=True):
        cells = [f"{strata[0]['time']:.2f}"]
        for q in strata:
            cells += [f"{q['strong']:.5f}", f"{q['weak']:.5f}", f"{q['guided']:.2%}"]
        rows.append(tuple(cells))
    columns = ["t"]
    for one in built:
        columns += [f"{TITLES[one['type']]}: cosine, strong", "cosine, weak", "guided"]
    return f"## {own['model']}, default builds at every time\n\n{table(columns, rows)}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
