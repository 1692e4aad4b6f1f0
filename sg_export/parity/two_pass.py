"""Reference sampler: Sparse Guidance in PyTorch as in the paper, in two separate passes.

All other implementations are compared with it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sg_export.loading import LoadedModel
from sg_runtime import philox
from sg_runtime.guidance import guidance_table, guide
from sg_runtime.manifest import GuidancePlan, Level, SamplerName
from sg_runtime.sampling import Churn, Update, integrate, precondition, trajectory


def sample(
    loaded: LoadedModel,
    guidance: GuidancePlan,
    classes: Sequence[int],
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

    Noise and kept tokens are those that the runtime draws for these seeds. classes: class indices;
    `num_classes` is "no class". weak: network of the weak branch, if it is not the strong branch's.
    levels, weak_levels: levels of the strong and the weak branch that a changing sparsity goes
    through; without weak_levels, the weak branch uses `levels`.
    """
    facts = loaded.facts
    path = trajectory(replace(loaded.sampling, steps=steps, sampler=sampler), facts.prediction, churn)
    run = path.updates
    table = guidance_table(guidance, run, levels, weak_levels or levels)
    strong_classes = torch.tensor(classes)
    weak_classes = torch.full_like(strong_classes, facts.num_classes) if guidance.row.null_weak else strong_classes

    def predict(
        network: LoadedModel, x: NDArray[np.float32], labels: Tensor, level: Level, branch: int, update: Update
    ) -> NDArray[np.float32]:
        scaling = precondition(facts.prediction, update.time)
        keep = None
        if level.keep < facts.tokens:
            at = {"step": update.step, "evaluation": update.evaluation, "branch": branch}
            keep = torch.from_numpy(np.stack([philox.subset(s, facts.tokens, level.keep, **at) for s in seeds]))
        state = torch.from_numpy(x)
        with torch.no_grad():
            output = network.model(scaling.c_in * state, torch.full((len(x),), scaling.t), labels, keep)
        prediction: NDArray[np.float32] = (scaling.c_skip * state + scaling.c_out * output).numpy()
        return prediction

    def advance(index: int, x: NDArray[np.float32], r: NDArray[np.float32]) -> NDArray[np.float32]:
        update, guided = run[index], table[index]
        prediction = predict(loaded, x, strong_classes, guided.strong, philox.STRONG, update)
        if guided.weak is not None:
            other = predict(weak or loaded, x, weak_classes, guided.weak, philox.WEAK, update)
            prediction = guide(prediction, other, guided.scale)
        a, b, e = (np.float32(value) for value in (update.a, update.b, update.e))
        following: NDArray[np.float32] = a * x + b * prediction + e * r
        return following

    def noise(purpose: int, step: int) -> NDArray[np.float32]:
        return np.stack([philox.normal(seed, purpose, facts.latent, step=step) for seed in seeds])

    start = np.float32(path.start) * noise(philox.INITIAL_NOISE, 0)
    return integrate(run, advance, start, lambda step: noise(philox.CHURN, step))
