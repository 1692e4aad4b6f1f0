"""The tensors of graphs: their names, their content, and their branch.

A step graph computes

    D = c_skip * x + c_out * F(c_in * x),    next = a * x + b * D + e * r

F is the network's output for one branch, or weak + scale * (strong - weak) for two branches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["state", "held", "rows", "restore", "keep", "scalar"]

COEFFICIENTS = ("c_in", "c_skip", "c_out", "a", "b", "e")
SCALARS = ("scale", *COEFFICIENTS)

HOISTED: Mapping[str, tuple[str, ...]] = {
    "condition": ("modulations",),
    "prompt": ("text_keys", "text_values", "text_bias"),
}
"""Outputs of the hoisted graphs, which run before the sampling loop, by kind.

Step graphs take them as inputs.
`condition` depends on time, and in class models also on the class. `prompt` depends on the prompt.
"""

HELD: Mapping[str, Literal["evaluation", "image"]] = {
    name: "evaluation" if kind == "condition" else "image" for kind, names in HOISTED.items() for name in names
}
"""Inputs for a branch's conditioning, by name.

Those per evaluation depend on time, those per image are the same in all evaluations of an image.
"""

KEPT: tuple[Role, ...] = ("rows", "restore")
"""Roles of the inputs for the kept tokens of a branch."""

BRANCHES = ("strong", "weak")


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a step graph.

    name: name of the tensor in the graph.
    role: "state" for the latents x and r, (B, C, H, W); "held" for the conditioning of a branch,
    (B, …), see `HELD`; "rows" and "restore" for the kept tokens of a branch, see
    `sg_runtime.run.kept`; "keep" for the same in graphs of schema 4 and earlier, (B, K); "scalar"
    for a number that all images share.
    branch: 0 for the strong or only branch; 1 for the weak branch; None if it belongs to no branch.
    """

    name: str
    role: Role
    branch: int | None = None


def step_inputs(branches: int, held: Iterable[str], separate: Iterable[str] = ()) -> tuple[Input, ...]:
    """Return the inputs, in order, of a step graph whose one or two branches drop tokens.

    held: names of the inputs for the conditioning. separate: those that the weak branch has of its
    own.
    """
    conditioning = [Input(name, "held", 0) for name in held]
    conditioning += [Input(f"{name}_weak", "held", 1) for name in separate]
    kept = [Input(f"{role}{end}", role, number) for number, end in _ends(branches) for role in KEPT]
    scalars = [Input(name, "scalar") for name in (SCALARS if branches == 2 else COEFFICIENTS)]
    return (Input("x", "state"), *conditioning, *kept, *scalars, Input("r", "state"))


def _ends(branches: int) -> Iterable[tuple[int, str]]:
    """Return the number of each branch and the end of its inputs' names."""
    return enumerate(f"_{branch}" for branch in BRANCHES) if branches == 2 else [(0, "")]


INPUTS: Mapping[str, Input] = {
    tensor.name: tensor
    for count in (1, 2)
    for tensor in (
        *step_inputs(count, HELD, HELD if count == 2 else ()),
        *(Input(f"keep{end}", "keep", number) for number, end in _ends(count)),
    )
}
"""All inputs of step graphs, by name."""


def is_separate(names: set[str]) -> bool:
    """Whether these input names belong to a graph whose weak branch has separate conditioning."""
    return any(name in INPUTS and INPUTS[name].role == "held" and INPUTS[name].branch == 1 for name in names)
