"""Sparse Guidance in PyTorch as the paper writes it, in two whole passes: the reference that others are held to."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sg_export.loading import LoadedModel
from sg_runtime import random
from sg_runtime.guidance import guide
from sg_runtime.manifest import GuidancePlan, Level, SamplerName
from sg_runtime.sampling import SAMPLERS, flow_times


def sample(
    loaded: LoadedModel,
    guidance: GuidancePlan,
    classes: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    sampler: SamplerName,
) -> NDArray[np.float32]:
    """Sample (B, C, H, W) float32 with the noise and the token subsets that the runtime draws for these seeds.

    classes: indices; `num_classes` is "no class".
    """
    facts, times = loaded.facts, flow_times(steps)
    strong_classes = torch.tensor(classes)
    weak_classes = torch.full_like(strong_classes, facts.num_classes) if guidance.mode == "cfg" else strong_classes

    def branch(x: Tensor, labels: Tensor, level: Level, number: int, step: int, evaluation: int) -> NDArray[np.float32]:
        t = torch.full((len(x),), float(times[step + evaluation]))
        keep = None
        if level.keep < facts.tokens:
            drawn = [
                random.subset(seed, facts.tokens, level.keep, step=step, evaluation=evaluation, branch=number)
                for seed in seeds
            ]
            keep = torch.from_numpy(np.stack(drawn))
        with torch.no_grad():
            prediction: NDArray[np.float32] = loaded.model(x, t, labels, keep).numpy()
        return prediction

    def velocity(x: NDArray[np.float32], step: int, evaluation: int) -> NDArray[np.float32]:
        state = torch.from_numpy(x)
        strong = branch(state, strong_classes, guidance.strong, random.STRONG, step, evaluation)
        if guidance.mode == "none":
            return strong
        weak = branch(state, weak_classes, guidance.weak, random.WEAK, step, evaluation)
        return guide(strong, weak, guidance.scale)

    shape = (facts.channels, facts.image_size, facts.image_size)
    noise = np.stack([random.normal(seed, random.INITIAL_NOISE, shape) for seed in seeds])
    return SAMPLERS[sampler](velocity, noise, times)
