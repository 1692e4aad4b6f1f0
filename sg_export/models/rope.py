"""Rotary position embedding (RoPE) of tokens on a grid, with interleaved pairs.

A head of size d has d/2 pairs of neighbouring channels. Each pair is rotated by an angle that grows
with the position on one axis. Source of the formulas: arXiv 2104.09864, sections 3.2 and 3.4.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(grid: Sequence[int], sizes: Sequence[int], theta: float) -> Tensor:
    """Return the rotations of all tokens of a grid, (N, 2d) float32, computed in float64.

    The first d columns are the cosines, the others the sines, with the sign that `rotate` needs.
    Both are repeated for the two channels of a pair.

    grid: number of positions on each axis; their product is N. The last axis varies fastest.
    sizes: number of channels of each axis, even; their sum is d.
    theta: base of the frequencies; pair k of an axis with s channels turns by theta^(-2k/s) in each
    position.
    """
    places = torch.cartesian_prod(*(torch.arange(count, dtype=torch.float64) for count in grid)).view(-1, len(grid))
    angles = torch.cat(
        [
            places[:, axis, None] / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
            for axis, size in enumerate(sizes)
        ],
        dim=-1,
    )
    cosines, sines = angles.cos(), angles.sin()
    interleaved = torch.stack([cosines, cosines], dim=-1), torch.stack([-sines, sines], dim=-1)
    return torch.cat([part.flatten(1) for part in interleaved], dim=-1).float()


def rotate(x: Tensor, rows: Tensor) -> Tensor:
    """Rotate queries or keys of all heads: x (B, R, heads, d), rows (1 or B, R, 2d) → like x.

    The pair (a, b) becomes (a cos - b sin, b cos + a sin), in the wider type of both arguments.
    rows: the rows of `rope_table` at the positions of the tokens.
    """
    cosines, sines = rows[:, :, None].chunk(2, dim=-1)
    first, second = x.unflatten(-1, (-1, 2)).chunk(2, dim=-1)  # type: ignore[no-untyped-call]
    return (x * cosines + torch.cat([second, first], dim=-1).flatten(-2) * sines).to(x.dtype)
