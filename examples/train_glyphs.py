"""Train the reference model `glyphs`: a TREAD-routed DiT on 16×16 characters, with rectified flow.

    python -m examples.train_glyphs --output runs/glyphs    # start or resume from the saved state

Blocks 1 to 6 of 8 see a random half of the tokens. The results are two float16 safetensors files
with the EMA weights. `glyphs.safetensors` is the final model. `glyphs-early.safetensors` is from
the first steps and is the weak model of AutoGuidance. The recipe follows CompVis/tread (`rf.py`:
logit-normal times, velocity loss; `dit.py`: initialisation).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.glyphs import CLASS_NAMES, SIZE, TRAINING_FONTS, render
from sg_export.adapters.tread import kept_count
from sg_export.checkpoint import METADATA_KEY
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.files import replacing
from sg_runtime.manifest import Route

CONFIG = DiTConfig(
    image_size=SIZE, patch=2, channels=1, width=128, depth=8, heads=4, mlp_width=512, num_classes=len(CLASS_NAMES)
)
ROUTE = Route(1, 6)
SELECTION_RATE = 0.5
VARIANTS = 64
BATCH = 128
CLASS_DROPOUT = 0.1
LEARNING_RATE = 1e-3
WARMUP = 200
SCHEDULE = 9600
"""Step at which the learning rate reaches its minimum.

The shipped model was trained for 6,400 steps.
"""
EARLY = 600
"""Step of the early checkpoint."""
EMA_DECAY = 0.999


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/glyphs"),
        help="folder of the training state and the checkpoints (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=6400, help="total number of optimizer steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train(options.output, options.steps, options.seed, torch.device(options.device))


def train(output: Path, steps: int, seed: int, device: torch.device) -> None:
    """Train for a total of `steps` steps and write both checkpoints to `output`.

    The state is saved every 200 steps, and training resumes from a saved state. Raises SystemExit
    if that state has another seed or more steps.
    """
    output.mkdir(parents=True, exist_ok=True)
    state_file = output / "state.pt"
    torch.manual_seed(seed)
    network = DiT(CONFIG)
    initialise(network)
    model = SparseModel(network, ROUTE).to(device)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        network.load_state_dict(state["model_state_dict"])
        optimizer.load_state_dict(state["optimizer_state_dict"])
        average, start = state["ema_state_dict"], state["step"]
        if state["seed"] != seed or start > steps:
            raise SystemExit(
                f"{state_file}: expected a state of seed {seed} with at most {steps} steps, found seed {state['seed']} "
                f"and {start} steps; give --seed {state['seed']} and at least {start} --steps, or another --output"
            )

    images, classes = render(TRAINING_FONTS, VARIANTS, seed)
    pixels = torch.from_numpy(images).to(device)
    labels = torch.from_numpy(classes).to(device)
    began, running = time.monotonic(), 0.0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step)
        loss = loss_at(model, pixels, labels, generator_at(seed, step), device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        running += loss.item()
        done = step + 1
        if done % 50 == 0:
            pace = (time.monotonic() - began) / (done - start)
            print(f"step {done}/{steps}  loss {running / 50:.4f}  {pace:.3f} s/step", flush=True)
            running = 0.0
        if done == EARLY:
            write(output / "glyphs-early.safetensors", average, done, seed)
        if done % 200 == 0 or done == steps:
            state = {"model_state_dict": network.state_dict(), "ema_state_dict": average, "step": done, "seed": seed}
            state["optimizer_state_dict"] = optimizer.state_dict()
            with replacing(state_file) as temporary:
                torch.save(state, temporary)
    write(output / "glyphs.safetensors", average, steps, seed)


def generator_at(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of one step.

    Each step has a separate generator, so a resumed run draws the same numbers as an uninterrupted
    run.
    """
    return torch.Generator().manual_seed((seed << 32) + step)


def loss_at(
    model: SparseModel, pixels: Tensor, labels: Tensor, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Return the velocity loss of rectified flow, z_t = (1 - t) x + t z, on one routed batch."""
    index = torch.randint(len(pixels), (BATCH,), generator=generator).to(device)
    x = pixels[index].unsqueeze(1).float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=generator).to(device)
    t = torch.sigmoid(torch.randn(BATCH, generator=generator)).to(device)
    dropped = (torch.rand(BATCH, generator=generator) < CLASS_DROPOUT).to(device)
    keep_count = kept_count(CONFIG.tokens, SELECTION_RATE)
    keep = torch.rand(BATCH, CONFIG.tokens, generator=generator).argsort(dim=1)[:, :keep_count].to(device)
    mixed = torch.lerp(x, noise, t[:, None, None, None])
    prediction = model(mixed, t, torch.where(dropped, CONFIG.num_classes, labels[index]), keep)
    return (noise - x - prediction).square().mean()


def learning_rate_factor(step: int) -> float:
    """Return the factor of the learning rate at `step`.

    It rises linearly in the warm-up. Then it follows a cosine that reaches 1/20 at step SCHEDULE
    and stays there.
    """
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.05 + 0.475 * (1 + math.cos(math.pi * min(1, (step - WARMUP) / (SCHEDULE - WARMUP))))


def initialise(network: DiT) -> None:
    """Initialise the weights as in upstream.

    Linears are Xavier, modulations and head are zero, and positions are fixed sines and cosines.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(network.x_embedder.proj.bias)
    nn.init.normal_(network.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(network.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(network.t_embedder.mlp[2].weight, std=0.02)
    for layer in [*(block.adaLN_modulation for block in network.blocks), network.final_layer.adaLN_modulation]:
        nn.init.zeros_(layer[1].weight)
    nn.init.zeros_(network.final_layer.linear.weight)
    side = network.config.image_size // network.config.patch
    network.pos_embed.data.copy_(sine_positions(network.config.width, side))


def sine_positions(width: int, side: int) -> Tensor:
    """Return positions (1, side * side, width): sine and cosine of the column, then of the row."""
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.broadcast_to(line[None], (side, side, width // 2))
    grid = np.concatenate([columns, columns.transpose(1, 0, 2)], axis=2)
    return torch.from_numpy(grid.reshape(1, side * side, width)).float()


def write(path: Path, weights: dict[str, Tensor], steps: int, seed: int) -> None:
    """Write float16 weights with the facts that their shapes do not show.

    `docs/checkpoints.md` describes the format.
    """
    facts = {
        "family": "tread",
        "heads": CONFIG.heads,
        "route": str(ROUTE),
        "selection_rate": SELECTION_RATE,
        "prediction": "flow",
        "class_names": CLASS_NAMES,
        "training": {
            "steps": steps,
            "batch": BATCH,
            "seed": seed,
            "data": f"62 characters, {len(TRAINING_FONTS)} DejaVu and STIX fonts of matplotlib {matplotlib_version()}, "
            f"{VARIANTS} distortions each, {SIZE}x{SIZE} grey",
        },
    }
    half = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in weights.items()}
    with replacing(path) as temporary:
        save_file(half, temporary, metadata={METADATA_KEY: json.dumps(facts)})


def matplotlib_version() -> str:
    import matplotlib

    return matplotlib.__version__


if __name__ == "__main__":
    main()
