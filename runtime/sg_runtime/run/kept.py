"""Kept tokens as the row numbers of a graph's two gathers.

The first gather takes the kept tokens before the route, from the B * N tokens of all images. The
second puts all tokens together after the route. It takes them from the rows that replace dropped
tokens, followed by the B * K routed tokens. Dropped tokens are replaced by themselves, B * N rows,
or by a mask token, one row.
"""

import numpy as np

from sg_runtime.arrays import Indices
from sg_runtime.manifest import ModelFacts
from sg_runtime.vocabulary import Role


def kept_input(role: Role, keep: Indices, model: ModelFacts) -> Indices:
    """Return the values of an input of this role: keep (…, B, K) → (…, B, K) or (…, B, N) int64."""
    if role == "keep":
        return keep
    return rows(keep, model.tokens) if role == "rows" else restore(keep, model.tokens, model.masked)


def rows(keep: Indices, tokens: int) -> Indices:
    """Return the rows of the kept tokens: keep (…, B, K) indices within an image → (…, B, K)."""
    return keep + tokens * np.arange(keep.shape[-2])[:, None]


def restore(keep: Indices, tokens: int, masked: bool) -> Indices:
    """Return the rows of all tokens after the route: keep (…, B, K) → (…, B, N) int64.

    masked: whether a mask token replaces the dropped tokens.
    """
    *runs, images, count = keep.shape
    own = np.arange(images * tokens).reshape(images, tokens)
    dropped, first = (np.zeros_like(own), 1) if masked else (own, images * tokens)
    result = np.tile(dropped, (*runs, 1, 1))
    routed = first + np.arange(images * count).reshape(images, count)
    np.put_along_axis(result, keep, np.broadcast_to(routed, keep.shape), axis=-1)
    return result
