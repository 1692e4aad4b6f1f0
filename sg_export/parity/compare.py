"""Comparisons of a bundle with PyTorch, and the JSON file that reports them."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polygraphy
import torch
from numpy.typing import NDArray

from sg_export.parity.distances import cosine, relative_l2
from sg_runtime.bundle import Bundle
from sg_runtime.files import replacing
from sg_runtime.manifest import GuidancePlan

Feed = dict[str, NDArray[Any]]

RUN_IMAGES = 2
"""Number of images in a comparison of graphs or runs."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison with PyTorch.

    subject: name of the graph or of the run.
    output: name of the compared output.
    time: t (sigma for an edm model along a guided run); None for a complete run.
    max_abs: largest absolute difference.
    relative_l2: relative L2 distance.
    cosine: cosine similarity.
    gate: largest relative L2 distance allowed; None if there is no such gate.
    least_cosine: least cosine similarity allowed; None if there is no such gate.
    passed: whether all values are finite and both gates hold.
    overflow: first operator of the graph that returned an infinity or a NaN; None if all is finite,
        or if it was not searched for.
    """

    subject: str
    output: str
    time: float | None
    max_abs: float
    relative_l2: float
    cosine: float
    gate: float | None
    least_cosine: float | None
    passed: bool
    overflow: str | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """All comparisons of a bundle.

    commands: Polygraphy commands that repeat comparisons of graphs; empty if no data was saved.
    """

    comparisons: tuple[Comparison, ...]
    commands: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(comparison.passed for comparison in self.comparisons)


def compare_arrays(
    subject: str,
    output: str,
    t: float | None,
    wanted: NDArray[np.float32],
    found: NDArray[np.float32],
    gate: float | None,
    least_cosine: float | None,
) -> Comparison:
    """Compare `found` with `wanted` in float64. Any NaN or infinity fails the comparison.

    Arrays of zeros are equal, see `distances`.
    """
    a, b = wanted.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    relative, similarity = relative_l2(found, wanted), cosine(found, wanted)
    passed = np.isfinite(relative) and (gate is None or relative <= gate)
    passed = passed and (least_cosine is None or similarity >= least_cosine)
    most = float(np.abs(b - a).max())
    return Comparison(subject, output, t, most, relative, similarity, gate, least_cosine, bool(passed))


def write_parity(parity: Parity, bundle: Bundle, path: Path) -> None:
    """Write the comparisons, with the versions of the libraries that made them, as JSON."""
    weak_source = bundle.manifest.weak_source
    content = {
        "bundle": bundle.path.name,
        "source": asdict(bundle.manifest.source),
        "weak_source": None if weak_source is None else asdict(weak_source),
        "passed": parity.passed,
        "versions": {module.__name__: module.__version__ for module in (torch, onnxruntime, polygraphy, np)},
        "threads": {"torch": torch.get_num_threads(), "machine": os.cpu_count()},
        "comparisons": [_finite(asdict(comparison)) for comparison in parity.comparisons],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON cannot express, by None."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in facts.items()}


def rates_of(guidance: GuidancePlan) -> str:
    """Return strong and weak sparsity in the form that a user writes: `STRONG/WEAK`.

    A sparsity that changes along the run is `FIRST:LAST`. If the guidance mode gives both branches
    the same sparsity, it appears once.
    """
    ends = [(guidance.strong, guidance.strong_last), (guidance.weak, guidance.weak_last)]
    shown = [f"{first.sparsity:g}" + ("" if last is None else f":{last.sparsity:g}") for first, last in ends]
    return "/".join(shown[:1] if guidance.row.weak_level == "same" else shown)
