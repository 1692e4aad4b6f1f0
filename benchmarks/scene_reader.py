"""A small convolutional network that reads scenes: which objects are where, on which background.

It is trained on drawn scenes. The features before its last layer are compared, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.scenes import COLOURS, NAMES, SIDE, Placed, Scene, draw, draw_caption
from examples.train_scenes import to_signed
from sg_runtime.files import replacing

CELL = 4
"""Side of a cell of the feature map, in pixels."""

FEATURES = 64
"""Channels of the last feature map. The Fréchet distance compares their means over the picture."""

BATCH = 64
LEARNING_RATE = 2e-3
THRESHOLD = 0.35
"""Least score of an object."""

APART = 1.5
"""Distance, in cells, within which two peaks are the same object."""

_COLOURS = tuple(COLOURS)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the network sees in a picture: objects, and the upper and lower colour."""

    objects: tuple[Placed, ...]
    background: tuple[str, str]


class Reader(nn.Module):
    """Detector after CenterNet (Zhou et al. 2019, arXiv 1904.07850).

    Every cell has a score for each object's centre, and the side of the object there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(3, 32, stride=2),
            *_convolution(32, FEATURES, stride=2),
            *(Residual(dilation) for dilation in (1, 2, 1, 2)),
        )
        self.centres = nn.Conv2d(FEATURES, len(NAMES), 1)
        self.sides = nn.Conv2d(FEATURES, 1, 1)
        self.colours = nn.Linear(FEATURES, len(COLOURS))
        nn.init.constant_(self.centres.bias, -4.0)  # type: ignore[arg-type]  # few cells hold a centre

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read pictures: x (B, 3, 64, 64) float32 in [-1, 1].

        Returns logits of centres (B, 16, 16, 16), sides / SIDE (B, 16, 16), logits of the upper and
        the lower colour (B, 2, 8), and features (B, 64).
        """
        seen: Tensor = self.body(x)
        edges = torch.stack([seen[:, :, :4].mean(dim=(2, 3)), seen[:, :, -4:].mean(dim=(2, 3))], dim=1)
        return self.centres(seen), self.sides(seen)[:, 0], self.colours(edges), seen.mean(dim=(2, 3))


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(FEATURES, FEATURES, dilation=dilation), *_convolution(FEATURES, FEATURES)[:-1]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: (B, 64, 16, 16) → the same shape."""
        return F.relu(x + self.body(x))


def _convolution(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def train(steps: int, seed: int) -> Reader:
    """Train a reader on `steps` batches of fresh scenes, with all pairs of objects.

    Pictures are blurred and made noisy at random, so that the reader goes by shapes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Reader().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        rng = np.random.default_rng(seed)
        for step in range(steps):
            scenes = [draw(draw_caption(rng, unseen=bool(rng.random() < 0.2)), rng) for _ in range(BATCH)]
            loss = _loss(model, _degraded(to_signed(np.stack([scene.pixels for scene in scenes]))), scenes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if (step + 1) % 100 == 0:
                print(f"reader: step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def _degraded(x: Tensor) -> Tensor:
    noisy = x + 0.08 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    blurred = F.avg_pool2d(F.pad(noisy, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.lerp(noisy, blurred, 0.8 * torch.rand(len(x), 1, 1, 1))


def _loss(model: Reader, x: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Return the sum of the losses of centres, sides and colours."""
    logits, sides, colours, _ = model(x)
    wanted = torch.zeros_like(logits)
    line = torch.arange(SIDE // CELL) + 0.5
    side_error = torch.zeros(())
    for index, scene in enumerate(scenes):
        for placed in scene.objects:
            column, row = placed.x / CELL, placed.y / CELL
            bump = torch.exp(-((line[:, None] - row) ** 2 + (line - column) ** 2) / 2)
            bump[int(row), int(column)] = 1.0
            channel = wanted[index, NAMES.index(placed.name)]
            torch.maximum(channel, bump, out=channel)
            side_error = side_error + (sides[index, int(row), int(column)] - placed.side / SIDE).abs()
    score = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = wanted == 1
    focal = torch.where(centre, (1 - score) ** 2 * score.log(), (1 - wanted) ** 4 * score**2 * (1 - score).log())
    meant = torch.tensor([[_COLOURS.index(colour) for colour in scene.background] for scene in scenes])
    objects = centre.sum()
    return (
        -focal.sum() / objects
        + 5 * side_error / objects
        + 0.3 * F.cross_entropy(colours.flatten(0, 1), meant.flatten())
    )


@torch.inference_mode()
def read(model: Reader, pictures: NDArray[np.uint8]) -> tuple[list[Reading], NDArray[np.float64]]:
    """Read pictures (N, 64, 64, 3): what is in them, and their features (N, 64)."""
    readings: list[Reading] = []
    features = []
    for start in range(0, len(pictures), 256):
        logits, sides, colours, part = model(to_signed(pictures[start : start + 256]))
        scores = logits.sigmoid()
        best, names = scores.max(dim=1)
        peaks = (best == F.max_pool2d(best, 3, stride=1, padding=1)) & (best > THRESHOLD)
        chosen = colours.argmax(dim=-1).tolist()
        for index in range(len(best)):
            found: list[Placed] = []
            places = peaks[index].nonzero().tolist()
            for row, column in sorted(places, key=lambda place: -float(best[index, place[0], place[1]])):
                x, y = (column + 0.5) * CELL, (row + 0.5) * CELL
                if all(np.hypot(x - other.x, y - other.y) > APART * CELL for other in found):
                    side = round(float(sides[index, row, column]) * SIDE)
                    name = NAMES[int(names[index, row, column])]
                    found.append(Placed(name, x, y, side))
            upper, lower = (_COLOURS[colour] for colour in chosen[index])
            readings.append(Reading(tuple(found), (upper, lower)))
        features.append(part)
    return readings, torch.cat(features).numpy().astype(np.float64)


def save(model: Reader, path: Path) -> None:
    """Write the weights to `path` atomically."""
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)


def load(path: Path) -> Reader:
    """Load a reader that `save` wrote."""
    model = Reader()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
