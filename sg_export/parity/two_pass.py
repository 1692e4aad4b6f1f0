"""Reference sampler: Sparse Guidance in PyTorch as in the paper, in two separate passes.

All other implementations are compared with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sg_export.graph.module import columns_in_torch
from sg_export.loading import LoadedModel
from sg_runtime import philox
from sg_runtime.conditions import Conditions
from sg_runtime.guidance import guidance_table, guide
from sg_runtime.manifest import GuidancePlan, Level, SamplerName
from sg_runtime.sampling import Churn, Update, integrate, precondition, trajectory


def sample(
    loaded: LoadedModel,
    guidance: GuidancePlan,
    conditions: Conditions,
    seeds: Sequence[int],
    steps: int,
    sampler: SamplerName,
    *,
    weak: LoadedModel | None = None,
    levels: Sequence[Level] = (),
    weak_levels: Sequence[Level] = (),
    churn: Churn | None = None,
) -> NDArray[np.float32]:
    """Sample images (B, C, H, W) float32.

    Noise and kept tokens are those that the runtime draws for these seeds. weak: network of the
    weak branch, if it is not the strong branch's. levels, weak_levels: levels of the strong and the
    weak branch that a changing sparsity goes through; without weak_levels, the weak branch uses
    `levels`.
    """
    facts = loaded.facts
    path = trajectory(replace(loaded.sampling, steps=steps, sampler=sampler), facts.prediction, churn)
    run = path.updates
    table = guidance_table(guidance, run, levels, weak_levels or levels)
    strong, other = (columns_in_torch(conditions, weak=own) for own in (False, guidance.row.null_weak))

    def predict(
        network: LoadedModel,
        x: NDArray[np.float32],
        columns: Mapping[str, Tensor],
        level: Level,
        branch: int,
        update: Update,
    ) -> NDArray[np.float32]:
        scaling = precondition(facts.prediction, update.time)
        keep = None
        if level.keep < facts.tokens:
            step, evaluation = guidance.draw(update.step, update.evaluation)
            at = {"step": step, "evaluation": evaluation, "branch": branch}
            keep = torch.from_numpy(np.stack([philox.subset(s, facts.tokens, level.keep, **at) for s in seeds]))
        state = torch.from_numpy(x)
        with torch.no_grad():
            output = network.model(scaling.c_in * state, torch.full((len(x),), scaling.t), columns, keep)
        prediction: NDArray[np.float32] = (scaling.c_skip * state + scaling.c_out * output).numpy()
        return prediction

    def advance(index: int, x: NDArray[np.float32], r: NDArray[np.float32]) -> NDArray[np.float32]:
        update, guided = run[index], table[index]
        prediction = predict(loaded, x, strong, guided.strong, philox.STRONG, update)
        if guided.weak is not None:
            second = predict(weak or loaded, x, other, guided.weak, philox.WEAK, update)
            prediction = guide(prediction, second, guided.scale)
        a, b, e = (np.float32(value) for value in (update.a, update.b, update.e))
        following: NDArray[np.float32] = a * x + b * prediction + e * r
        return following

    def noise(purpose: int, step: int) -> NDArray[np.float32]:
        return np.stack([philox.normal(seed, purpose, facts.latent, step=step) for seed in seeds])

    start = np.float32(path.start) * noise(philox.INITIAL_NOISE, 0)
    return integrate(run, advance, start, lambda step: noise(philox.CHURN, step))
