"""Part `build-xl`: builds the bundles of DiT-XL/2."""

import time
from collections.abc import Iterator

from benchmarks.gpu import bundles
from benchmarks.gpu.child import Check, Context
from benchmarks.gpu.results import Figure, Finding


def build(context: Context) -> Iterator[Finding]:
    """Build the bundles if they are missing, or were built by other code."""
    began, reason = time.perf_counter(), bundles.xl_missing(context.xl)
    if reason:
        bundles.build_xl(context.xl)
    size = sum(file.stat().st_size for file in context.xl.rglob("*") if file.is_file())
    figures = (
        Figure.of("build", "s", time.perf_counter() - began),
        Figure.of("checkpoint and bundles", "GB", size / 1e9),
    )
    yield Finding("", True, reason or "was complete", figures)


CHECKS: tuple[Check, ...] = (build,)
