"""The bundles that are checked: `glyphs`, and DiT-XL/2 with random weights."""

import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import PRODUCT, ROOT, digest

TARGET: dict[str, Any] = {"onnx_target": "onnxruntime-cuda"}
"""Compile options that choose what the graphs are for, the same for all bundles."""

SETTINGS = {"γ 0/0.5": (0.0, 0.5), "γ 0.5/0.9": (0.5, 0.9)}
"""Sparsities of the strong and the weak branch. The first is the default of the bundles."""

MODEL = "XL/2"
XL_BATCHES: dict[str, int | None] = {"one": 1, "any": None}
"""Bundles of DiT-XL/2: one for a single image, one for any number of images."""

STAMP = "built.json"
"""File in the folder of DiT-XL/2 that says what its bundles were built with, written last."""


def xl_folder() -> Path:
    """Return the folder of the bundles of DiT-XL/2: $SG_XL, or one among the temporary files."""
    return Path(os.environ.get("SG_XL") or Path(tempfile.gettempdir()) / "sg-export-xl")


def xl_missing(folder: Path, model: str = MODEL) -> str:
    """Return why the bundles of DiT-XL/2 have to be built, or ""."""
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{folder}: no bundles of DiT-{model}"
    if found != stamp(model):
        return f"{folder}: built by other code or with other options"
    lacking = [name for name in (*XL_BATCHES, "random.pt") if not (folder / name).exists()]
    return f"{folder}: without {', '.join(lacking)}" if lacking else ""


def build_xl(folder: Path, model: str = MODEL) -> None:
    """Build the checkpoint and the bundles of DiT-XL/2, in place of earlier ones.

    The checkpoint has 2.7 GB, each bundle has 1.4 GB. With at least eight cores both bundles are
    built at the same time.
    """
    from benchmarks.guided_step import random_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).unlink(missing_ok=True)
    random_checkpoint(model, folder)
    at_once = 2 if (os.cpu_count() or 1) >= 8 else 1
    with ProcessPoolExecutor(at_once, get_context("spawn")) as processes:
        for building in [processes.submit(_build, folder, model, name) for name in XL_BATCHES]:
            building.result()
    temporary = folder / f"{STAMP}.tmp"
    temporary.write_text(json.dumps(stamp(model)) + "\n", encoding="utf-8")
    os.replace(temporary, folder / STAMP)


def _build(folder: Path, model: str, name: str) -> None:
    from benchmarks.guided_step import ROUTES
    from sg_export import CompileOptions, Overrides, compile

    options = CompileOptions(
        folder / name,
        sparsity=_each(1),
        strong_sparsity=_each(0),
        precision="fp16",
        batch=XL_BATCHES[name],
        overrides=Overrides(route=ROUTES[model], prediction="flow"),
        steps=40,
        force=True,
        **TARGET,
    )
    compile(folder / "random.pt", options)


def xl_bundle(folder: Path, images: int) -> Path:
    """Return the bundle of DiT-XL/2 for a number of images."""
    return folder / ("one" if images == 1 else "any")


def glyphs(folder: Path, precision: Any, batch: int | None, *, plain: bool = False) -> Path:
    """Return a bundle of `glyphs` at sparsities 0 and 0.5, which is built once in `folder`.

    batch: number of images that its graphs are fixed to, or None for any number.
    plain: whether to leave out TARGET, so that the CPU can run the graphs.
    """
    from sg_export import CompileOptions, compile

    plain = plain or not TARGET
    output = folder / f"glyphs-{precision}-{batch or 'any'}{'-plain' if plain else ''}"
    if not (output / "manifest.json").exists():
        target = {} if plain else TARGET
        compile("glyphs", CompileOptions(output, (0.5,), precision=precision, batch=batch, force=True, **target))
    return output


def _each(branch: int) -> tuple[float, ...]:
    return tuple(pair[branch] for pair in SETTINGS.values())


def stamp(model: str) -> dict[str, object]:
    """Return what the bundles depend on."""
    sources = digest([*(ROOT / path for path in PRODUCT), Path(__file__)])
    return {"model": model, "target": TARGET, "settings": list(map(list, SETTINGS.values())), "sources": sources}
