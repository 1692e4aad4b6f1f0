"""The parts of the check, what each needs, and what of that is missing on a machine."""

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import bundles
from benchmarks.gpu.machine import MODULES, Found

LEAST_ORT = (1, 31, 1)
"""Oldest release of onnxruntime-gpu whose captured graphs are right."""

RUNTIME = ("cuda", "numpy", "PIL", "pydantic")
EXPORT = (*RUNTIME, "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "safetensors", "sympy")
VERIFY = (*EXPORT, "click", "rich", "polygraphy", "pytest", "hypothesis")

LIMIT = 300
"""Seconds that the default parts have together."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the check, which runs in a process of its own.

    name: name on the command line, and of its file of results.
    checks: tuple of checks, as "module:name".
    seconds: time limit.
    says: what it shows.
    default: whether it runs if no part is named.
    gpu: whether it needs a GPU. Results of a part without one are printed, not stored.
    ort: whether it needs onnxruntime-gpu.
    xl: whether it needs the bundles of DiT-XL/2, which are built before it if they are missing.
    modules: modules that it needs besides.
    """

    name: str
    checks: str
    seconds: int
    says: str
    default: bool = True
    gpu: bool = True
    ort: bool = True
    xl: bool = False
    modules: tuple[str, ...] = RUNTIME


_IN = "benchmarks.gpu.checks"

PARTS = {
    part.name: part
    for part in (
        Part(
            "driver",
            f"{_IN}.driver:CHECKS",
            60,
            "Driver calls, DLPack, what ends a capture, and the floor: products in cuBLAS, attention, launches.",
            ort=False,
            modules=("cuda", "numpy", "PIL"),
        ),
        Part(
            "correctness",
            f"{_IN}.correctness:CHECKS",
            150,
            "The tests for a GPU, `verify --device cuda`, and runs of ONNX Runtime: nodes, results, streams, "
            "threads, captures that are disturbed, the end of a process.",
            modules=VERIFY,
        ),
        Part(
            "build-xl",
            f"{_IN}.build_xl:CHECKS",
            1800,
            "Builds the bundles of DiT-XL/2 with random weights. Needs no GPU.",
            default=False,
            gpu=False,
            ort=False,
            modules=tuple(name for name in EXPORT if name != "cuda"),
        ),
        Part(
            "speed",
            f"{_IN}.speed:CHECKS",
            180,
            "DiT-XL/2 in FP16: guided step, loop of 40 steps, memory and kernels, next to its products in cuBLAS.",
            xl=True,
        ),
        Part(
            "eager",
            f"{_IN}.baselines:EAGER",
            120,
            "`sg-export bench` of DiT-XL/2, in turn with PyTorch eager in BF16.",
            xl=True,
            modules=EXPORT,
        ),
        Part(
            "compiled",
            f"{_IN}.baselines:COMPILED",
            900,
            "The same in turn with torch.compile, which takes minutes to compile.",
            default=False,
            xl=True,
            modules=EXPORT,
        ),
        Part(
            "forms",
            f"{_IN}.forms:CHECKS",
            300,
            "Other forms of the step of DiT-XL/2 and of its patterns on ONNX Runtime: kernels and times.",
            default=False,
            modules=("numpy", "onnx"),
        ),
        Part(
            "outer",
            f"{_IN}.outer:CHECKS",
            60,
            "One CUDA graph of our own around runs of ONNX Runtime. The process may abort.",
            default=False,
            modules=("numpy", "onnx"),
        ),
    )
}
"""All parts in the order of a run."""


def chosen(names: list[str], xl: Path) -> list[Part]:
    """Return the named parts, by default those that are default, in the order of PARTS.

    xl: folder of the bundles of DiT-XL/2. Their build is added if they are missing and a part needs
    them.
    """
    parts = [part for part in PARTS.values() if (part.name in names if names else part.default)]
    if any(part.xl for part in parts) and bundles.xl_missing(xl):
        parts = [part for part in PARTS.values() if part in parts or part.name == "build-xl"]
    return parts


def missing(part: Part, found: Found) -> list[str]:
    """Return what the part needs and this machine lacks, each with what was found or the remedy."""
    lacks = []
    if part.gpu and (reason := no_gpu(found)):
        lacks.append(reason)
    elif "torch" not in found.versions:
        lacks.append("torch: pip install torch")
    if part.ort and (reason := _no_ort(found)):
        lacks.append(reason)
    absent = [MODULES[name] for name in part.modules if name not in found.versions]
    if absent:
        lacks.append(f"{', '.join(absent)}: pip install {' '.join(absent)}")
    return lacks


def needs(part: Part) -> str:
    """Return what the part needs, in words."""
    named = [
        "a GPU and torch with CUDA" if part.gpu else "torch",
        f"onnxruntime-gpu >= {_dotted(LEAST_ORT)}" if part.ort else "",
        "the XL bundles" if part.xl else "",
        " ".join(MODULES[name] for name in part.modules),
    ]
    return ", ".join(filter(None, named))


def no_gpu(found: Found) -> str:
    """Return why PyTorch cannot use a GPU here, or ""."""
    if found.card:
        return ""
    if "torch" not in found.versions:
        return f"torch with CUDA: not installed ({found.errors.get('torch', 'no module')})"
    if not found.cuda:
        return f"torch with CUDA: found torch {found.versions['torch']}, which is built without CUDA"
    return f"an NVIDIA GPU: torch {found.versions['torch']} finds none (NVIDIA's driver: {found.driver})"


def _no_ort(found: Found) -> str:
    wanted = f"onnxruntime-gpu >= {_dotted(LEAST_ORT)}"
    version = found.versions.get("onnxruntime")
    if version is None:
        return f"{wanted}: not installed ({found.errors.get('onnxruntime', 'no module')})"
    if "CUDAExecutionProvider" not in found.providers:
        return f"{wanted}: found onnxruntime {version} without the CUDA provider; uninstall onnxruntime first"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < LEAST_ORT:
        return f"{wanted}: found {version}"
    return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
