"""The tensors of graphs: their names, what each holds, and the branch that it belongs to.

A step graph computes

    D = c_skip * x + c_out * F(c_in * x),    next = a * x + b * D + e * r

with F the network's output for one branch, or weak + scale * (strong - weak) of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["state", "held", "keep", "scalar"]

COEFFICIENTS = ("c_in", "c_skip", "c_out", "a", "b", "e")
SCALARS = ("scale", *COEFFICIENTS)

HELD = ("modulations",)
"""What a branch holds for one evaluation, by the input that takes it."""

BRANCHES = ("strong", "weak")


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a step graph.

    name: its name in the graph.
    role: "state" for the latents x and r, (B, C, H, W); "held" for what a branch holds, (B, M); "keep" for the kept
    tokens of a branch, (B, K); "scalar" for a number that all images share.
    branch: 0 for the strong branch, or the only one; 1 for the weak one; None if it belongs to no branch.
    """

    name: str
    role: Role
    branch: int | None = None


def step_inputs(branches: int, separate: bool) -> tuple[Input, ...]:
    """The inputs of a step graph of one or two branches, in order, if both leave out tokens.

    separate: the weak branch holds tensors of its own.
    """
    held = [Input(name, "held", 0) for name in HELD]
    held += [Input(f"{name}_weak", "held", 1) for name in HELD if separate]
    keep = [Input("keep", "keep", 0)]
    if branches == 2:
        keep = [Input(f"keep_{branch}", "keep", number) for number, branch in enumerate(BRANCHES)]
    scalars = [Input(name, "scalar") for name in (SCALARS if branches == 2 else COEFFICIENTS)]
    return (Input("x", "state"), *held, *keep, *scalars, Input("r", "state"))


INPUTS: Mapping[str, Input] = {tensor.name: tensor for count in (1, 2) for tensor in step_inputs(count, count == 2)}
"""All inputs of step graphs by name."""


def is_separate(names: set[str]) -> bool:
    """Whether a graph with inputs of these names has a weak branch that holds tensors of its own."""
    return any(name in INPUTS and INPUTS[name].role == "held" and INPUTS[name].branch == 1 for name in names)
