"""Predictions of both branches in PyTorch."""

from collections.abc import Mapping

import torch

from sg_export.graph.check import check_reference
from sg_export.graph.module import columns_in_torch
from sg_export.loading import LoadedModel
from sg_export.parity.walk import BranchPredictor
from sg_runtime.arrays import Array
from sg_runtime.conditions import Conditions
from sg_runtime.run.prepared import PreparedBranch, PreparedRun
from sg_runtime.sampling import precondition


def by_pytorch(loaded: LoadedModel, weak: LoadedModel | None, conditions: Conditions) -> BranchPredictor:
    """Return a predictor of both branches in PyTorch, for images of these conditions.

    It raises CheckpointError if a value is not finite.
    """
    facts = loaded.facts

    def predict(
        network: LoadedModel,
        branch: PreparedBranch,
        columns: Mapping[str, torch.Tensor],
        x: Array,
        plan: PreparedRun,
        k: int,
    ) -> Array:
        scaling, keep = precondition(facts.prediction, plan.times[k]), branch.keep[k]
        state = torch.from_numpy(x)
        with torch.no_grad():
            output = network.model(
                scaling.c_in * state,
                torch.full((len(x),), scaling.t),
                columns,
                None if keep is None else torch.from_numpy(keep),
            )
        found: Array = (scaling.c_skip * state + scaling.c_out * output).numpy()
        check_reference(network.source, f"time {plan.times[k]:.3g} of a run", found)
        return found

    def branches(x: Array, plan: PreparedRun, index: int) -> tuple[Array, Array]:
        strong = predict(loaded, plan.strong, columns_in_torch(conditions), x, plan, index)
        if plan.weak is None or len(plan.active(index)) == 1:
            return strong, strong
        columns = columns_in_torch(conditions, weak=plan.guidance.row.null_weak)
        return strong, predict(weak or loaded, plan.weak, columns, x, plan, index)

    return branches
