"""Baseline of `bench`: a plain loop of Sparse Guidance in PyTorch, with two passes per step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sg_export.graph.module import columns_in_torch
from sg_export.loading import LoadedModel, reload_checkpoint, reload_weak
from sg_runtime import philox
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Conditions
from sg_runtime.guidance import guidance_table, levels
from sg_runtime.manifest import Level
from sg_runtime.run.sample import noise
from sg_runtime.sampling import precondition, trajectory


class TorchLoop:
    """A callable that runs the bundle's default guidance and sampler and returns the run time.

    The run time is in seconds.

    It computes in FP32 on the CPU. On a GPU it computes in BF16, or in FP32 if the bundle is in
    FP32. Noise and kept tokens are drawn before the timing starts. All data stays on the device.
    compiled: whether torch.compile compiles the networks; on a GPU in its mode "max-autotune".
    """

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: str | Path | None,
        weak_checkpoint: str | Path | None,
        conditions: Conditions,
        steps: int,
        compiled: bool,
        device: str,
    ) -> None:
        manifest = bundle.manifest
        half = device != "cpu" and manifest.precision != "fp32"
        self.precision = "bf16" if half else "fp32"
        self._device, self._dtype = device, torch.bfloat16 if half else torch.float32
        loaded = reload_checkpoint(bundle, checkpoint)
        weak = reload_weak(bundle, weak_checkpoint, loaded) or loaded
        self._facts, guidance = loaded.facts, manifest.guidance
        mode = "default" if device == "cpu" else "max-autotune"
        self._networks = [self._ready(network, compiled, mode) for network in (loaded, weak)]
        path = trajectory(replace(manifest.sampling, steps=steps), self._facts.prediction)
        self._updates = path.updates
        self._table = guidance_table(
            guidance, self._updates, levels(manifest), levels(manifest, guidance.row.weak_network)
        )
        seeds = range(len(conditions))
        self._start = self._put(np.float32(path.start) * noise(manifest, seeds, philox.INITIAL_NOISE)).float()
        self._conditions = [
            {name: values.to(device) for name, values in columns_in_torch(conditions, weak=weak).items()}
            for weak in (False, guidance.row.null_weak)
        ]
        self._keeps = [
            [
                self._subsets(seeds, level, number, *guidance.draw(update.step, update.evaluation))
                for number, level in enumerate(pair)
            ]
            for update, pair in zip(self._updates, [(g.strong, g.weak) for g in self._table], strict=True)
        ]

    def __call__(self) -> float:
        self._wait()
        began = time.perf_counter()
        with torch.inference_mode():
            x = start = self._start
            for update, guided, keeps in zip(self._updates, self._table, self._keeps, strict=True):
                if update.evaluation == 0:
                    start = x
                prediction = self._predict(0, x, update.time, keeps[0])
                if guided.weak is not None:
                    weak = self._predict(1, x, update.time, keeps[1])
                    prediction = weak + guided.scale * (prediction - weak)
                x = update.a * x + update.b * prediction + update.e * start
        self._wait()
        return time.perf_counter() - began

    def _predict(self, branch: int, x: Tensor, at: float, keep: Tensor | None) -> Tensor:
        scaling = precondition(self._facts.prediction, at)
        t = torch.full((len(x),), scaling.t, device=self._device)
        output = self._networks[branch]((scaling.c_in * x).to(self._dtype), t, self._conditions[branch], keep)
        prediction: Tensor = scaling.c_skip * x + scaling.c_out * output.float()
        return prediction

    def _ready(self, network: LoadedModel, compiled: bool, mode: str) -> Callable[..., Any]:
        model = network.model.to(self._device, self._dtype)
        return torch.compile(model, mode=mode, dynamic=False) if compiled else model

    def _subsets(self, seeds: Sequence[int], level: Level | None, branch: int, step: int, evaluation: int) -> Any:
        if level is None or level.keep == self._facts.tokens:
            return None
        at = {"step": step, "evaluation": evaluation, "branch": branch}
        rows = [philox.subset(seed, self._facts.tokens, level.keep, **at) for seed in seeds]
        return torch.from_numpy(np.stack(rows)).to(self._device)

    def _put(self, values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(self._device)

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
