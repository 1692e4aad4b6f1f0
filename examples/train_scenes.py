"""Train the reference model `scenes`: a text-to-image PRX with TREAD routing, from scratch.

    python -m examples.train_scenes --output runs/scenes    # start, or resume from the saved states

It trains an autoencoder on crops of scenes, then the transformer and its text encoder on latents.
Blocks 1 to 6 of 8 see a random half of the tokens. The text encoder is trained along up to the
early checkpoint and then kept, so that both checkpoints read the same embeddings. The results have
averaged weights in float16: `scenes`, a folder of `PRXPipeline`, and `scenes-early.safetensors`,
the early transformer, the weak model of AutoGuidance. The recipe follows CompVis/tread
(`rf.py`: logit-normal times, velocity loss) and the published transformer of PRX.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.scenes import NAMES, SIDE, WORDS, Caption, draw, draw_caption
from sg_export.adapters.prx import kept_count
from sg_export.checkpoint import METADATA_KEY, sidecar_of
from sg_export.models.prx import PRX, PRXConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.files import replacing
from sg_runtime.manifest import Route

PIXELS_PER_LATENT = 4
TEXT_TOKENS = 16
CONFIG = PRXConfig(
    image_size=(SIDE // PIXELS_PER_LATENT, SIDE // PIXELS_PER_LATENT),
    patch=2,
    channels=4,
    width=192,
    depth=8,
    heads=6,
    mlp_width=672,
    context=128,
    text_tokens=TEXT_TOKENS,
)
ROUTE = Route(1, 6)
SELECTION_RATE = 0.5
TIME_SHIFT = 1.0
BATCH = 128
PROMPT_DROPOUT = 0.1
LEARNING_RATE = 1.5e-3
WARMUP = 300
COOLDOWN = 0.25
"""Share of the steps, at the end, in which the learning rate falls to a twentieth."""
EARLY = 1000
"""Step of the early checkpoint, from which on the text encoder stays as it is."""
EMA_DECAY = 0.999
POOL = 16384
"""Number of scenes that are drawn and encoded at once."""
POOL_STEPS = 768
"""Number of steps that a pool is used for."""
HELD_OUT_SCENES = 512
SAVED = 250
"""Number of steps from one saved state to the next."""

AUTOENCODER = {
    "latent_channels": CONFIG.channels,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": SIDE,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
AUTOENCODER_BATCH = 64
CROP = 32
"""Height and width of a crop, in pixels: the autoencoder has no attention, so crops are enough."""
AUTOENCODER_RATE = 2e-3
KL_WEIGHT = 2e-4
PARTS = {"autoencoder": 2000, "decoder": 2000}
"""What is trained before the transformer, and for how many steps.

The decoder is trained further alone. That changes no latent, so it can be repeated later.
"""

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/scenes"),
        help="folder of the training states and the results (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=6000, help="total number of optimizer steps (default %(default)s)")
    for part in PARTS:
        parser.add_argument(
            f"--{part}-steps",
            type=int,
            default=PARTS[part],
            help=f"number of optimizer steps of the {part} (default %(default)s)",
        )
    parser.add_argument(
        "--initial",
        type=Path,
        help="folder of an earlier result, whose weights are the start if there is no saved state. The optimizer "
        "has no state then.",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="compute matrix products in BF16: faster on GPUs, and on CPUs that have instructions for it",
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    part_steps = {part: getattr(options, f"{part}_steps") for part in PARTS}
    autoencoder = train_autoencoder(options.output, part_steps, options.seed, device, options.initial)
    train(options.output, autoencoder, options.steps, options.seed, device, options.bf16, options.initial)


def train_autoencoder(
    output: Path, steps: Mapping[str, int], seed: int, device: torch.device, initial: Path | None = None
) -> Any:
    """Train the autoencoder, then its decoder alone, or load it from `output` if it is there.

    steps: number of steps of each of PARTS. initial: folder of a pipeline, whose autoencoder is
    taken in place of a new one; its decoder alone is trained.
    """
    from diffusers import AutoencoderKL

    folders = {part: output / part for part in PARTS}
    if folders["decoder"].exists():
        return AutoencoderKL.from_pretrained(folders["decoder"]).to(device).eval()
    torch.manual_seed(seed)
    if initial is not None:
        model = AutoencoderKL.from_pretrained(initial, subfolder="vae").float()
    elif folders["autoencoder"].exists():
        model = AutoencoderKL.from_pretrained(folders["autoencoder"])
    else:
        model = AutoencoderKL(**AUTOENCODER)
        fit(model, "autoencoder", output, steps["autoencoder"], seed, device)
        latents = encode_scenes(model, draw_scenes(2048, (seed, 2))[0], device)
        mean, deviation = latents.mean().item(), latents.std().item()
        model.register_to_config(scaling_factor=round(1 / deviation, 5), shift_factor=round(mean, 5))
        model.save_pretrained(folders["autoencoder"])
    fit(model, "decoder", output, steps["decoder"], seed, device)
    model.save_pretrained(folders["decoder"])
    return model


def fit(model: Any, part: str, output: Path, steps: int, seed: int, device: torch.device) -> None:
    """Train `part` of an autoencoder for a total of `steps` steps.

    The loss is the mean absolute error. The whole autoencoder has a small weight on the distance of
    its latents to a normal distribution. The decoder alone has the error of the differences between
    neighbours, too, which keeps edges sharp.
    """
    model.to(device, memory_format=torch.channels_last).train()
    model.encoder.requires_grad_(part == "autoencoder")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=AUTOENCODER_RATE, weight_decay=0.0)
    start, state_file = 0, output / f"{part}.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    pace = Pace(start, steps)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            wave = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = AUTOENCODER_RATE * min(1.0, (step + 1) / 100) * wave
        rng = np.random.default_rng((seed, list(PARTS).index(part), step))
        scenes = np.stack([draw(draw_caption(rng), rng).pixels for _ in range(AUTOENCODER_BATCH // 2)])
        x = to_signed(np.concatenate([_crop(scenes, rng), _crop(scenes, rng)])).to(device)
        latents = model.encode(x).latent_dist
        noise = torch.randn(latents.mean.shape, generator=generator_at(seed, step)).to(device)
        error = model.decode(latents.mean + latents.std * noise).sample - x
        if part == "decoder":
            more = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        else:
            more = KL_WEIGHT * 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (error.abs().mean() + more).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        pace.show(step + 1, f"{part}: absolute error {255 / 2 * error.abs().mean().item():.2f} of 255")
        if (step + 1) % SAVED == 0:
            save_state({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state_file)
    model.eval()


def _crop(scenes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(SIDE - CROP, size=2, endpoint=True)
    return scenes[:, top : top + CROP, left : left + CROP]


def to_signed(pixels: np.ndarray) -> Tensor:
    """Return pixels (B, H, W, 3) uint8 as (B, 3, H, W) float32 in [-1, 1]."""
    signed = torch.from_numpy(pixels).float() / 127.5 - 1
    return signed.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def draw_scenes(count: int, seed: Sequence[int]) -> tuple[np.ndarray, list[Caption]]:
    """Draw scenes: pixels (count, 64, 64, 3) uint8, and their captions."""
    rng = np.random.default_rng(seed)
    captions = [draw_caption(rng) for _ in range(count)]
    return np.stack([draw(caption, rng).pixels for caption in captions]), captions


@torch.no_grad()
def encode_scenes(autoencoder: Any, pixels: np.ndarray, device: torch.device) -> Tensor:
    """Return the latents that the autoencoder gives, without scale and shift: (B, 4, 16, 16)."""
    parts = [to_signed(pixels[at : at + 256]).to(device) for at in range(0, len(pixels), 256)]
    return torch.cat([autoencoder.encode(part).latent_dist.mean for part in parts]).contiguous()


@dataclass(frozen=True, slots=True)
class Pool:
    """Scenes to train on: latents (P, 4, 16, 16), token ids and mask (P, 16) int64."""

    latents: Tensor
    ids: Tensor
    mask: Tensor

    @classmethod
    def drawn(cls, autoencoder: Any, tokenizer: Any, count: int, seed: Sequence[int], device: torch.device) -> "Pool":
        """Draw and encode scenes."""
        pixels, captions = draw_scenes(count, seed)
        config = autoencoder.config
        latents = (encode_scenes(autoencoder, pixels, device) - config.shift_factor) * config.scaling_factor
        return cls(latents, *tokenize(tokenizer, [str(caption) for caption in captions], device))


def tokenize(tokenizer: Any, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, (B, 16) int64."""
    tokens = tokenizer(prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    return tokens["input_ids"].to(device), tokens["attention_mask"].to(device)


def make_tokenizer() -> Any:
    """Return a tokenizer of the grammar's words. Unknown words have one token of their own."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    special = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=TEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )


def make_text_encoder() -> Any:
    """Return a text encoder of PRX's class with two layers."""
    from diffusers.pipelines.prx import T5GemmaEncoder
    from transformers.models.t5gemma import T5GemmaModuleConfig

    config = T5GemmaModuleConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=CONFIG.context,
        intermediate_size=2 * CONFIG.context,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=CONFIG.context // 4,
        query_pre_attn_scalar=CONFIG.context // 4,
        attn_logit_softcapping=None,
    )
    config.dropout_rate = 0.0  # read by the encoder, and no field
    config._attn_implementation = "eager"
    return T5GemmaEncoder(config)


class Model(nn.Module):
    """Transformer and text encoder, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        network = PRX(CONFIG)
        initialise(network)
        self.transformer = SparseModel(network, ROUTE)
        self.text_encoder = make_text_encoder()

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings (B, 16, 128) of prompts."""
        embedded: Tensor = self.text_encoder(input_ids=ids, attention_mask=mask)["last_hidden_state"]
        return embedded


@dataclass(frozen=True, slots=True)
class Batch:
    """What the loss of a batch depends on, besides the text: latents, noise, t, and kept tokens.

    latents, noise: (B, 4, 16, 16). t: (B,). keep: (B, K) int64; None for a dense pass.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    keep: Tensor | None

    @classmethod
    def drawn(cls, latents: Tensor, generator: torch.Generator, routed: bool = True) -> "Batch":
        """Draw the random parts with a generator of the CPU."""
        count, device = len(latents), latents.device
        noise = torch.randn(latents.shape, generator=generator).to(device)
        t = torch.sigmoid(torch.randn(count, generator=generator)).to(device)
        kept = kept_count(CONFIG.tokens, SELECTION_RATE)
        keep = torch.rand(count, CONFIG.tokens, generator=generator).argsort(dim=1)[:, :kept].to(device)
        return cls(latents, noise, t, keep if routed else None)


def loss_of(transformer: nn.Module, batch: Batch, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Return the velocity loss of rectified flow, z_t = (1 - t) x + t z, on one batch."""
    mixed = torch.lerp(batch.latents, batch.noise, batch.t[:, None, None, None])
    prediction = transformer(mixed, batch.t, {"embeddings": embeddings, "mask": mask}, batch.keep)
    return (batch.noise - batch.latents - prediction.float()).square().mean()


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    """Compute attention by two products, which is faster in BF16 on a CPU than the fused kernel."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + attn_mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


@contextmanager
def in_bf16(device: torch.device) -> Iterator[None]:
    """Compute matrix products in BF16 within the block. Weights stay in FP32."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", plain_attention))
        yield


def train(
    output: Path,
    autoencoder: Any,
    steps: int,
    seed: int,
    device: torch.device,
    bf16: bool,
    initial: Path | None = None,
) -> None:
    """Train transformer and text encoder for a total of `steps` steps, and write the results.

    The state is saved every `SAVED` steps. A run with more steps than an earlier one goes on from
    where the earlier one's learning rate began to fall. Without a saved state it goes on from the
    weights of the pipeline in `initial`, and from `curve.json` if it is in `output`. Raises
    SystemExit if it cannot go on from the saved states; see `saved_state`.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model, tokenizer = Model().to(device), make_tokenizer()
    average = deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.99))
    cooling = cooling_of(steps)
    start, warm, curve = 0, 0, []
    if (state := saved_state(output, steps, seed, device)) is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, curve, warm = state["step"], state["curve"], state["warm"]
    elif initial is not None:
        start = warm = load_initial(model, initial)
        average = deepcopy(model).eval()
        curve = json.loads((output / "curve.json").read_bytes()) if (output / "curve.json").exists() else []
    null_ids, null_mask = tokenize(tokenizer, [""], device)
    held_out = Pool.drawn(autoencoder, tokenizer, HELD_OUT_SCENES, (seed, 4), device)
    pool, pace, running, counted = None, Pace(start, steps), 0.0, 0
    for step in range(start, steps):
        if pool is None or step % POOL_STEPS == 0:
            pool = Pool.drawn(autoencoder, tokenizer, POOL, (seed, 3, step // POOL_STEPS), device)
        if step >= EARLY:
            model.text_encoder.requires_grad_(False)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step - warm, steps - warm, cooling - warm)
        generator = generator_at(seed, step)
        index = torch.randint(len(pool.ids), (BATCH,), generator=generator).to(device)
        dropped = (torch.rand(BATCH, generator=generator) < PROMPT_DROPOUT).to(device)[:, None]
        ids, mask = torch.where(dropped, null_ids, pool.ids[index]), torch.where(dropped, null_mask, pool.mask[index])
        batch = Batch.drawn(pool.latents[index], generator)
        optimizer.zero_grad(set_to_none=True)
        with in_bf16(device) if bf16 else nullcontext():
            loss = loss_of(model.transformer, batch, model.embed(ids, mask), mask)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, min(EMA_DECAY, (step - warm + 1) / (step - warm + 10)))
        running, counted = running + loss.item(), counted + 1
        done = step + 1
        if done == EARLY:
            model.text_encoder.load_state_dict(average.text_encoder.state_dict())
            write_transformer(output / "scenes-early.safetensors", average, facts_after(done, seed))
        if done % SAVED == 0 or done in (cooling, steps):
            curve.append({"step": done, "loss": running / counted})
            curve[-1] |= {name: held_out_loss(average, held_out, seed, name == "held_out_routed") for name in HELD_OUT}
            running, counted = 0.0, 0
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": done, "steps": steps, "seed": seed, "curve": curve, "warm": warm}
            save_state(state, output / "state.pt")
            if done == cooling:
                save_state(state, output / "state-stable.pt")
        pace.show(done, ", ".join(f"{name} {value:.4f}" for name, value in (curve[-1] if curve else {}).items()))
    with replacing(output / "curve.json") as temporary:
        temporary.write_text(json.dumps(curve, indent=1) + "\n")
    write_pipeline(output / "scenes", average, tokenizer, autoencoder, facts_after(steps, seed))


HELD_OUT = ("held_out_dense", "held_out_routed")


@torch.no_grad()
def held_out_loss(model: Model, pool: Pool, seed: int, routed: bool) -> float:
    """Return the loss of a model on scenes that are not in training, dense or routed."""
    batch = Batch.drawn(pool.latents, generator_at(seed, -1), routed)
    return loss_of(model.transformer, batch, model.embed(pool.ids, pool.mask), pool.mask).item()


class Pace:
    """Progress of a training, a line every ten seconds at most."""

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps = start, steps
        self.began = self.shown = time.monotonic()

    def show(self, done: int, text: str) -> None:
        """Print the step, the time that is left, and `text`."""
        now = time.monotonic()
        if now - self.shown < 10 and done < self.steps:
            return
        self.shown = now
        pace = (now - self.began) / (done - self.start)
        left = pace * (self.steps - done) / 60
        print(f"step {done}/{self.steps}  {pace:.3f} s/step, {left:.0f} min left  {text}", flush=True)


def generator_at(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of one step, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed((seed << 32) + step)


def save_state(state: dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)


def saved_state(output: Path, steps: int, seed: int, device: torch.device) -> dict[str, Any] | None:
    """Return the newest state that a run of `steps` steps can go on from, or None without a state.

    Its learning rate has not begun to fall, neither in its own run nor in this one, unless its run
    had as many steps. Raises SystemExit if there are states and none fits.
    """
    found = []
    for name in ("state.pt", "state-stable.pt"):
        if (output / name).exists():
            state: dict[str, Any] = torch.load(output / name, map_location=device, weights_only=True)
            same = state["steps"] == steps
            if state["seed"] == seed and (same or state["step"] <= min(cooling_of(state["steps"]), cooling_of(steps))):
                return state
            found.append(f"seed {state['seed']}, {state['step']} of {state['steps']} steps")
    if found:
        raise SystemExit(
            f"{output}: expected a state of seed {seed} before the learning rate of {steps} steps falls, found "
            f"{' and '.join(found)}; give that seed and as many steps or more, or another --output"
        )
    return None


def cooling_of(steps: int) -> int:
    """Return the step of a run of `steps` steps at which the learning rate begins to fall."""
    return round(steps * (1 - COOLDOWN))


def load_initial(model: Model, folder: Path) -> int:
    """Load transformer and text encoder of an earlier result. Returns the number of its steps."""
    from diffusers import PRXPipeline

    pipeline = PRXPipeline.from_pretrained(folder).to(torch.float32)
    model.transformer.network.load_state_dict(pipeline.transformer.state_dict())
    model.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    steps: int = json.loads(sidecar_of(folder).read_bytes())["training"]["steps"]
    return steps


def learning_rate_factor(step: int, steps: int, cooling: int) -> float:
    """Return the factor of the rate. It rises, stays, and falls to 1/20 from `cooling` on."""
    return min(1.0, (step + 1) / WARMUP, 1 - 0.95 * max(0, step - cooling) / max(1, steps - cooling))


def initialise(network: PRX) -> None:
    """Initialise as CompVis/tread does: linears by Xavier, modulations and head zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in (network.time_in.in_layer, network.time_in.out_layer):
        nn.init.normal_(layer.weight, std=0.02)
    zero = [*(block.modulation.lin for block in network.blocks), network.final_layer.adaLN_modulation[1]]
    for layer in [*zero, network.final_layer.linear]:
        nn.init.zeros_(layer.weight)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def write_pipeline(folder: Path, model: Model, tokenizer: Any, autoencoder: Any, facts: dict[str, Any]) -> None:
    """Write a folder of `PRXPipeline` in float16, and next to it the facts that it lacks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel
    from transformers.models.t5gemma import T5GemmaConfig

    transformer = PRXTransformer2DModel(
        in_channels=CONFIG.channels,
        patch_size=CONFIG.patch,
        context_in_dim=CONFIG.context,
        hidden_size=CONFIG.width,
        mlp_ratio=CONFIG.mlp_width / CONFIG.width,
        num_heads=CONFIG.heads,
        depth=CONFIG.depth,
        axes_dim=[CONFIG.width // CONFIG.heads // 2] * 2,
    )
    transformer.load_state_dict(model.transformer.network.state_dict())
    pipeline = PRXPipeline(
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        text_encoder=deepcopy(model.text_encoder).half(),
        tokenizer=tokenizer,
        vae=deepcopy(autoencoder).half(),
        default_sample_size=SIDE,
    )
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_bytes())
    # As in published folders. The names that saving gives do not load everywhere.
    index |= {"text_encoder": ["prx", "T5GemmaEncoder"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # The place that the autoencoder was loaded from means nothing elsewhere.
    config = json.loads((folder / "vae" / "config.json").read_bytes())
    config.pop("_name_or_path", None)
    (folder / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # `T5GemmaEncoder` reads the encoder's part of a whole configuration.
    encoder = model.text_encoder.config.to_dict()
    whole = T5GemmaConfig(encoder=encoder, decoder=encoder).to_dict() | {"architectures": ["T5GemmaEncoder"]}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    with replacing(folder.with_name(f"{folder.name}.json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")


def write_transformer(file: Path, model: Model, facts: dict[str, Any]) -> None:
    """Write the transformer alone in float16, with the facts that its shapes do not show."""
    facts = facts | {
        "family": "prx",
        "heads": CONFIG.heads,
        "size": [SIDE, SIDE],
        "text_tokens": TEXT_TOKENS,
        "channels": CONFIG.channels,
        "patch": CONFIG.patch,
        "pixels_per_latent": PIXELS_PER_LATENT,
        "time_shift": TIME_SHIFT,
    }
    state = model.transformer.network.state_dict()
    half = {name: value.to("cpu", torch.float16).contiguous() for name, value in state.items()}
    with replacing(file) as temporary:
        save_file(half, temporary, metadata={METADATA_KEY: json.dumps(facts)})


def facts_after(steps: int, seed: int) -> dict[str, Any]:
    """Return what no tensor shows of a model after `steps` steps."""
    data = f"scenes of {len(NAMES)} emoji, {SIDE}x{SIDE} RGB"
    training = {"steps": steps, "batch": BATCH, "seed": seed, "data": data, "text_encoder_steps": min(steps, EARLY)}
    return {"route": str(ROUTE), "selection_rate": SELECTION_RATE, "training": training}


if __name__ == "__main__":
    main()
