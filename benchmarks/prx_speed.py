r"""Compare complete runs of a PRX with loops of diffusers' own transformer, on the CPU.

    pip install -c constraints.txt -e '.[export,ort,diffusers]'
    python -m benchmarks.prx_speed --output benchmarks/results/prx_speed.json

The network has size S (width 384, 12 blocks, route 2-9), 256 image tokens and 64 text tokens, and
random weights in FP32. A run goes from embeddings of prompts and noise to latents, in 28 Euler
steps. All sides run in turn in every round, in one process with the same threads. Diffusers'
`PRXTransformer2DModel` is eager, under `torch.inference_mode`, with diffusers' scheduler and its
default attention. Every step has other kept tokens. They are drawn before diffusers' loop and are
those of our run, and the latents are compared with ours.

ours         the guided graph, and both hoisted graphs
hooks        dense and routed pass of diffusers' transformer, routed by hooks as in training
cfg twice    two dense passes of diffusers' transformer, with the prompt and with the empty prompt
cfg batched  one dense pass of diffusers' transformer on twice the batch, as in its pipeline
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.guided_step import PAUSE
from benchmarks.machine import machine
from benchmarks.prx_models import CONTEXT, SMALL, write_folder
from sg_export import CompileOptions, compile
from sg_export.adapters import prx
from sg_runtime import Pipeline, philox
from sg_runtime.manifest import Route

STEPS, SCALE, SHIFT = 28, 3.0, 3.0
PAIRS = {"0/0.5": (0.0, 0.5), "0.5/0.9": (0.5, 0.9)}
CLOSE = 1e-4
"""Bound on the relative L2 distance of both sides' latents, whose sums have another order."""


@dataclass(frozen=True, slots=True)
class Row:
    """Time of a complete run.

    batch: number of images.
    pair: sparsities of the strong and the weak branch; None for CFG.
    side: name of the side.
    seconds: median time over the rounds.
    quartiles: lower and upper quartile of that time, in seconds.
    """

    batch: int
    pair: str | None
    side: str
    seconds: float
    quartiles: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of a side as a multiple of our time in the same round.

    pair: sparsities of our two branches.
    side: "hooks", or the way of CFG with the lower median time.
    ratio: median over the rounds.
    quartiles: lower and upper quartile of the ratio.
    """

    batch: int
    pair: str
    side: str
    ratio: float
    quartiles: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Embeddings (B, L, C) and masks (B, L) of prompts, and of the empty prompt for each."""

    embeddings: Tensor
    mask: Tensor
    empty: Tensor
    empty_mask: Tensor

    @classmethod
    def random(cls, count: int) -> "Prompts":
        """Return random prompts. A quarter of their tokens is padding, and all but one if empty."""
        generator, tokens = torch.Generator().manual_seed(0), SMALL.text_tokens
        embeddings, empty = torch.randn(2, count, tokens, CONTEXT, generator=generator)
        real = torch.arange(tokens).expand(count, -1)
        return cls(embeddings, real < tokens * 3 // 4, empty, real < 1)


class Routing:
    """Hooks on diffusers' transformer that run the blocks of the route on the kept tokens.

    Before the route they take the kept tokens and their rotations, and after it they put the tokens
    back, as in Photoroom's training code (`algorithm/tread.py`, commit 46ef08f).

    keep: indices (B, K) of the kept tokens; None for a dense pass.
    """

    def __init__(self, network: Any, route: Route) -> None:
        self.keep: Tensor | None = None
        self._before: Tensor | None = None
        self._rotations: Tensor | None = None
        blocks = network.blocks[route.start : route.end + 1]
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[-1].register_forward_hook(self._leave)

    def _enter(self, _block: Any, args: Any, given: dict[str, Any]) -> Any:
        if self.keep is None:
            return None
        if self._before is None:
            self._before = given["hidden_states"]
            rotations = given["image_rotary_emb"]  # (1 or B, 1, N, head size / 2, 2, 2)
            own = rotations.expand(len(self.keep), *rotations.shape[1:])
            self._rotations = torch.stack([rows[:, keep] for rows, keep in zip(own, self.keep, strict=True)])
            index = self.keep[..., None].expand(-1, -1, self._before.shape[2])
            given = given | {"hidden_states": self._before.gather(1, index)}
        return args, given | {"image_rotary_emb": self._rotations}

    def _leave(self, _block: Any, _args: Any, output: Tensor) -> Tensor | None:
        if self.keep is None or self._before is None:
            return None
        before, self._before = self._before, None
        return before.scatter(1, self.keep[..., None].expand(output.shape), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    ratios: list[Ratio] = []
    distances: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(SMALL, Path(scratch) / "prx")
        built = CompileOptions(
            Path(scratch) / "bundle",
            (0.5, 0.9),
            (0.0, 0.5),
            scale=SCALE,
            steps=options.steps,
            overrides=SMALL.overrides,
        )
        bundle = compile(folder, built)
        pipe = Pipeline.load(bundle, "cpu", batch=max(options.batch), threads=options.threads)
        network = load_diffusers(folder)
        routing = Routing(network, SMALL.route)
        with torch.inference_mode():
            for batch in options.batch:
                found, compared, apart = measure(pipe, network, routing, batch, options.steps, options.rounds)
                rows, ratios, distances = rows + found, ratios + compared, distances | apart
    for row in rows:
        print(f"B={row.batch} {row.pair or 'CFG':8} {row.side:12} {row.seconds:8.3f} s  {row.quartiles}")
    for ratio in ratios:
        print(f"B={ratio.batch} {ratio.pair:8} {ratio.side:12} {ratio.ratio:6.2f}  {ratio.quartiles}")
    if options.output:
        content = {
            "machine": machine("numpy", "torch", "diffusers", "onnxruntime"),
            "setup": {
                "steps": options.steps,
                "threads": options.threads,
                "rounds": options.rounds,
                "precision": "fp32",
            },
            "relative_l2_to_hooks": distances,
            "rows": [asdict(row) for row in rows],
            "ratios": [asdict(ratio) for ratio in ratios],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def load_diffusers(folder: Path) -> Any:
    """Load diffusers' transformer from a folder of its pipeline."""
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel.from_pretrained(folder, subfolder="transformer", low_cpu_mem_usage=False).eval()


def measure(
    pipe: Pipeline, network: Any, routing: Routing, batch: int, steps: int, rounds: int
) -> tuple[list[Row], list[Ratio], dict[str, float]]:
    """Time all sides in turn, after the runs for the comparison of latents.

    Returns also the relative L2 distance between our latents and those of the hooks, by setting.
    """
    prompts, seeds = Prompts.random(batch), range(batch)
    text = pipe.prompts(prompts.embeddings, prompts.mask)
    noise = torch.from_numpy(pipe.initial_noise(seeds))
    sides: dict[tuple[str | None, str], Callable[[], object]] = {}
    distances = {}
    for pair, rates in PAIRS.items():
        plan = pipe.guidance(strong_sparsity=rates[0], sparsity=rates[1], subset="fresh")
        keeps = [drawn(batch, rate, branch, steps) for branch, rate in enumerate(rates)]

        def ours(plan: Any = plan) -> NDArray[np.float32]:
            return pipe.sample(text, seeds, steps=steps, guidance=plan)

        def hooks(keeps: Any = keeps) -> Tensor:
            guided = functools.partial(branches, network, routing, keeps=keeps, prompts=prompts)
            return loop(noise, steps, guided)

        sides[pair, "ours"], sides[pair, "hooks"] = ours, hooks
        found, wanted = ours(), hooks().numpy()
        apart = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        if not apart <= CLOSE:
            raise SystemExit(f"expected the same latents within {CLOSE:g}, found a distance of {apart:.2g}")
        distances[f"{pair}, batch {batch}"] = float(f"{apart:.2g}")
    routing.keep = None
    for way, predict in (("cfg twice", cfg_twice), ("cfg batched", cfg_batched)):
        sides[None, way] = functools.partial(loop, noise, steps, functools.partial(predict, network, prompts=prompts))
    times: dict[tuple[str | None, str], list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            routing.keep = None
            time.sleep(PAUSE)
            began = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - began)
    rows = [Row(batch, *side, *_median(series)) for side, series in times.items()]
    cfg = min(("cfg twice", "cfg batched"), key=lambda way: statistics.median(times[None, way]))
    ratios = []
    for pair in PAIRS:
        for place in ((pair, "hooks"), (None, cfg)):
            both = zip(times[place], times[pair, "ours"], strict=True)
            ratios.append(Ratio(batch, pair, place[1], *_median([theirs / own for theirs, own in both])))
    return rows, ratios, distances


def _median(values: list[float]) -> tuple[float, tuple[float, float]]:
    low, middle, high = statistics.quantiles(values, n=4)
    return round(middle, 3), (round(low, 3), round(high, 3))


def drawn(batch: int, sparsity: float, branch: int, steps: int) -> list[Tensor | None]:
    """Return the kept tokens (B, K) of every step that our run with seeds 0 to B - 1 draws."""
    if sparsity == 0:
        return [None] * steps
    tokens = SMALL.config.tokens
    keep, places = prx.kept_count(tokens, sparsity), [(step, 0) for step in range(steps)]
    own = [philox.subsets(seed, tokens, keep, places, branch=branch) for seed in range(batch)]
    return list(torch.from_numpy(np.stack(own, axis=1)))


def loop(noise: Tensor, steps: int, predict: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Sample with diffusers' scheduler.

    predict: latents (B, C, H, W), times (B,) in [0, 1] and number of the step → velocity.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    x = noise
    for step, time_of_step in enumerate(scheduler.timesteps):
        velocity = predict(x, (time_of_step / 1000).expand(len(x)), step)
        (x,) = scheduler.step(velocity, time_of_step, x, return_dict=False)
    return x


def branches(
    network: Any, routing: Routing, x: Tensor, t: Tensor, step: int, keeps: list[list[Tensor | None]], prompts: Prompts
) -> Tensor:
    """Return the guided velocity of two passes with the same prompts."""
    outputs = []
    for keep in keeps:
        routing.keep = keep[step]
        outputs.append(run(network, x, t, prompts.embeddings, prompts.mask))
    strong, weak = outputs
    return weak + SCALE * (strong - weak)


def cfg_twice(network: Any, x: Tensor, t: Tensor, _step: int, prompts: Prompts) -> Tensor:
    """Return the velocity of classifier-free guidance by two passes."""
    strong = run(network, x, t, prompts.embeddings, prompts.mask)
    weak = run(network, x, t, prompts.empty, prompts.empty_mask)
    return weak + SCALE * (strong - weak)


def cfg_batched(network: Any, x: Tensor, t: Tensor, _step: int, prompts: Prompts) -> Tensor:
    """Return the velocity of classifier-free guidance by one pass of twice the batch."""
    text, mask = torch.cat([prompts.empty, prompts.embeddings]), torch.cat([prompts.empty_mask, prompts.mask])
    weak, strong = run(network, torch.cat([x, x]), torch.cat([t, t]), text, mask).chunk(2)
    return weak + SCALE * (strong - weak)


def run(network: Any, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Run diffusers' transformer once."""
    output: Tensor = network(x, timestep=t, encoder_hidden_states=text, attention_mask=mask, return_dict=False)[0]
    return output


if __name__ == "__main__":
    main()
