"""Predictions of both branches in PyTorch."""

from collections.abc import Sequence

import torch

from sg_export.graph.check import check_reference
from sg_export.loading import LoadedModel
from sg_export.parity.walk import BranchPredictor
from sg_runtime.arrays import Array
from sg_runtime.run.prepared import PreparedBranch, PreparedRun
from sg_runtime.sampling import precondition


def by_pytorch(loaded: LoadedModel, weak: LoadedModel | None, classes: Sequence[int]) -> BranchPredictor:
    """Return a predictor of both branches in PyTorch, for images of these classes.

    It raises CheckpointError if a value is not finite.
    """
    facts = loaded.facts

    def predict(
        network: LoadedModel, branch: PreparedBranch, labels: torch.Tensor, x: Array, plan: PreparedRun, k: int
    ) -> Array:
        scaling, keep = precondition(facts.prediction, plan.times[k]), branch.keep[k]
        state = torch.from_numpy(x)
        with torch.no_grad():
            output = network.model(
                scaling.c_in * state,
                torch.full((len(x),), scaling.t),
                labels,
                None if keep is None else torch.from_numpy(keep),
            )
        found: Array = (scaling.c_skip * state + scaling.c_out * output).numpy()
        check_reference(network, f"time {plan.times[k]:.3g} of a run", found)
        return found

    def branches(x: Array, plan: PreparedRun, index: int) -> tuple[Array, Array]:
        labels = torch.tensor(classes)
        strong = predict(loaded, plan.strong, labels, x, plan, index)
        if plan.weak is None or len(plan.active(index)) == 1:
            return strong, strong
        null = torch.full_like(labels, facts.num_classes) if plan.guidance.row.null_weak else labels
        return strong, predict(weak or loaded, plan.weak, null, x, plan, index)

    return branches
