"""Page of `sg-export report`: one self-contained HTML file, for any screen size, light and dark."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sg_export.report.collect import BundleReport, Page
from sg_runtime import __version__

COLOURS = ("#2a6fdb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285")

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def render(page: Page) -> str:
    """Return the page as HTML."""
    model = page.bundles[0].manifest.model
    title = f"{page.bundles[0].manifest.source.name}: {', '.join(b.manifest.precision_name for b in page.bundles)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(model.family)}, {model.depth} blocks of width {model.width}, {model.tokens} tokens, route "
        f"{escape(str(model.route))}, {model.parameters / 1e6:.1f} M parameters. Made by sg-export {__version__}. "
        f"Times and distances were measured on the machine that made this page. Layers and remarks come from the "
        f"builds of the bundles.</p>",
        "<h2>Bundles</h2>",
        _table(
            ["bundle", "precision", "MB", "run of one image, ms", "time / first", "backend"],
            [
                [
                    b.name,
                    b.manifest.precision_name,
                    f"{b.bytes / 1e6:.1f}",
                    f"{b.seconds * 1e3:.1f}",
                    f"{b.seconds / page.bundles[0].seconds:.2f}",
                    b.backend,
                ]
                for b in page.bundles
            ],
        ),
        *(f"<p><b>{escape(b.name)}: {escape(r)}</b></p>" for b in page.bundles for r in _remarks(b)),
        "<h2>Cost of a step</h2>",
        "<p>Means over a default run of one image, counted from the graphs of the first bundle.</p>",
        _table(
            ["", "linear GMAC", "attention GMAC", "weights read, MB"],
            [
                [
                    cost.way,
                    f"{(cost.linear_macs + cost.condition_macs) / 1e9:.4g}",
                    f"{cost.attention_macs / 1e9:.4g}",
                    f"{(cost.weight_bytes + cost.condition_bytes) / 1e6:.4g}",
                ]
                for cost in page.costs
            ],
        ),
        *_parts(page),
        *_quality(page),
        *(part for bundle in page.bundles for part in _layers(bundle)),
        *_samples(page),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>{"".join(parts)}</body></html>\n'
    )


def _parts(page: Page) -> list[str]:
    """Return the section on text encoder and decoder."""
    if not page.parts:
        return []
    rows = [
        [
            cost.part,
            str(cost.runs),
            f"{cost.linear_macs / 1e9:.4g}",
            f"{cost.attention_macs / 1e9:.4g}",
            f"{cost.weight_bytes / 1e6:.4g}",
            f"{cost.share:.1%}",
        ]
        for cost in page.parts
    ]
    return [
        "<h2>Cost of an image</h2>",
        "<p>For an image with a prompt of its own, by part of the first bundle. An encoded prompt serves all its "
        "images.</p>",
        _table(["part", "runs", "linear GMAC", "attention GMAC", "weights read, MB", "share of GMAC"], rows),
    ]


def _remarks(bundle: BundleReport) -> tuple[str, ...]:
    plan = bundle.manifest.quantization
    return () if plan is None else plan.remarks


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _quality(page: Page) -> list[str]:
    """Return the section on the distance of guided predictions to the first bundle's, over time."""
    compared = [bundle for bundle in page.bundles if bundle.quality]
    if not compared:
        return []
    model = page.bundles[0].manifest.model
    lines = [[(q.time, q.guided) for q in bundle.quality or ()] for bundle in compared]
    gates = [b.manifest.quantization.gates.guided for b in compared if b.manifest.quantization is not None]
    rows = [
        [
            bundle.name,
            f"{min(q.strong for q in bundle.quality or ()):.5f}",
            f"{min(q.weak for q in bundle.quality or ()):.5f}",
            f"{max(q.guided for q in bundle.quality or ()):.2%}",
            f"{bundle.runs or 0:.2%}",
        ]
        for bundle in compared
    ]
    return [
        "<h2>Distance to the first bundle, over time</h2>",
        f"<p>Relative L2 distance of the guided prediction at ω = {page.scale:g} along the same runs, from noise "
        f"(left) to the image (right). Dashed: the gates. Two runs of the first bundle with different kept tokens "
        f"end {page.mask_noise:.2%} apart.</p>",
        _key([bundle.name for bundle in compared]),
        _lines(lines, sorted(set(gates)), "sigma" if model.prediction == "edm" else "time t"),
        _table(
            ["", "strong branch, least cosine", "weak branch, least cosine", "guided, largest", "complete runs"], rows
        ),
    ]


def _key(names: Sequence[str]) -> str:
    marks = "".join(
        f'<span style="background:{COLOURS[k % len(COLOURS)]}"></span>{escape(name)}' for k, name in enumerate(names)
    )
    return f'<div class="key">{marks}</div>'


def _lines(lines: Sequence[Sequence[tuple[float, float]]], gates: Sequence[float], time_name: str) -> str:
    """Return an SVG chart of `lines` over time. Time falls from left to right.

    time_name: title of the axis of times.
    """
    width, height, left, above, bottom = 640, 290, 60, 36, 62
    top = max([value for line in lines for _, value in line] + list(gates)) * 1.08 or 1.0
    times = [time for line in lines for time, _ in line]
    first, last = max(times), min(times)

    def place(time: float, value: float) -> str:
        x = left + (first - time) / (first - last or 1) * (width - left - 8)
        return f"{x:.1f},{above + (1 - value / top) * (height - above - bottom):.1f}"

    marks = []
    step = _round_step(top)
    for tick in (number * step for number in range(int(top / step) + 1)):
        y = float(place(first, tick).partition(",")[2])
        marks.append(f'<line class="axis" x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{left - 6}" y="{y + 5}" text-anchor="end">{tick * 100:.3g}%</text>')
    for time in (first, (first + last) / 2, last):
        x = float(place(time, 0).partition(",")[0])
        anchor = "start" if time == first else "end" if time == last else "middle"
        marks.append(f'<text x="{x}" y="{height - 40}" text-anchor="{anchor}">{time:.3g}</text>')
    across = (left + width - 8) / 2
    marks.append(f'<text x="{across}" y="{height - 12}" text-anchor="middle">{time_name}</text>')
    marks.append('<text x="4" y="18">relative L2 distance</text>')
    for gate in gates:
        start, end = place(first, gate).split(","), place(last, gate).split(",")
        marks.append(f'<line class="gate" x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"/>')
        marks.append(f'<text x="{end[0]}" y="{float(end[1]) - 5:.1f}" text-anchor="end">gate {gate:.1%}</text>')
    for k, line in enumerate(lines):
        points = " ".join(place(time, value) for time, value in line)
        marks.append(f'<polyline fill="none" stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="2" points="{points}"/>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(marks)}</svg>'


def _round_step(top: float) -> float:
    """Return a round distance of marks, so that there are three to six from 0 to `top`."""
    power = 10.0 ** math.floor(math.log10(top))
    return next(share * power for share in (0.2, 0.5, 1.0, 2.0) if top < 6 * share * power)


def _layers(bundle: BundleReport) -> list[str]:
    """Return the section on a quantized bundle's layers: their sensitivity and their types."""
    plan = bundle.manifest.quantization
    if plan is None:
        return []
    measured = [layer for layer in plan.layers if layer.sensitivity is not None]
    top = max((layer.sensitivity or 0 for layer in measured), default=0) or 1
    bars = []
    for layer in sorted(measured, key=lambda layer: -(layer.sensitivity or 0)):
        share, colour = (layer.sensitivity or 0) / top, COLOURS[0] if layer.quantized else COLOURS[1]
        bars.append(
            f'<span>{escape(layer.name)}</span><div><i style="width:{share:.1%};background:{colour}"></i>'
            f"{layer.sensitivity:.2%}</div>"
        )
    cells = "".join(
        f'<div class="{"" if layer.quantized else "high"} {"weight" if layer.weight_only else ""}" '
        f'title="{escape(layer.reason)}, {layer.bytes_saved / 1e6:.2f} MB saved">{escape(layer.name)}</div>'
        for layer in plan.layers
    )
    return [
        f"<h2>{escape(bundle.name)}: layers</h2>",
        f"<p>Distance of the guided prediction to FP32 if only that layer is quantized. Ranges: method "
        f"{escape(plan.method)}, {plan.evaluations} evaluations of {plan.images} images.</p>",
        _key([escape(plan.type), f"stays in {bundle.manifest.precision}"]),
        f'<div class="bars">{"".join(bars)}</div>',
        f"<p>Layers of the network in {escape(plan.type)}. Dashed: only the weights are quantized. Framed: the layer "
        f"stays in {bundle.manifest.precision}.</p>",
        f'<div class="map">{cells}</div>',
    ]


def _samples(page: Page) -> list[str]:
    """Return the section of sample grids: one row for each guidance mode, bundles side by side."""
    modes = [mode for mode in ("none", "cfg", "sg") if any(mode in bundle.samples for bundle in page.bundles)]
    if not modes:
        return [
            "<h2>Samples</h2><p>There are no images: the bundles have no decoder for the model's latents, or no text "
            "encoder for its prompts.</p>"
        ]
    titles = {"none": "Unguided", "cfg": "CFG", "sg": "Sparse Guidance"}
    parts = [f"<h2>Samples</h2><p>{page.images} images, with the same seeds and kept tokens in every bundle.</p>"]
    if page.prompts:
        parts.append(f"<ol>{''.join(f'<li>{escape(prompt)}</li>' for prompt in page.prompts)}</ol>")
    for mode in modes:
        figures = "".join(
            f'<figure><img alt="{titles[mode]}, {escape(bundle.name)}" src="{_png(bundle.samples[mode])}">'
            f"<figcaption>{escape(bundle.name)}</figcaption></figure>"
            for bundle in page.bundles
            if mode in bundle.samples
        )
        parts.append(f'<h3>{titles[mode]}</h3><div class="grids">{figures}</div>')
    return parts


def _png(pixels: NDArray[np.uint8]) -> str:
    """Return a picture as a data URL."""
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
