"""A small convolutional classifier that judges generated glyphs.

It is trained on real glyphs. Its penultimate features are compared, too.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.glyphs import CLASS_NAMES
from sg_runtime.files import replacing

FEATURES = 64
"""Width of the penultimate layer. The Fréchet distance compares the values of this layer."""

BATCH = 256
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05


class Classifier(nn.Module):
    """Classifier with three convolutions and two linear layers.

    Two of the convolutions are strided. The linear layers give `FEATURES` values and one logit per
    character.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32, stride=1),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 96, stride=2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(96 * 16, FEATURES),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        self.last = nn.Linear(FEATURES, len(CLASS_NAMES))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits: x (B, 1, 16, 16) float32 in [-1, 1] → (B, 62)."""
        logits: Tensor = self.last(self.body(x))
        return logits


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def train(images: NDArray[np.uint8], classes: NDArray[np.int64], epochs: int, seed: int) -> Classifier:
    """Train a classifier on images (N, 16, 16) and their classes (N,).

    The optimizer is AdamW with one cycle of the learning rate. The same seed gives the same
    classifier on the same machine and library versions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier().train()
        pixels, labels = _pixels(images), torch.from_numpy(classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        batches = -(-len(labels) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
        for _ in range(epochs):
            for index in torch.randperm(len(labels)).tensor_split(batches):
                loss = F.cross_entropy(model(pixels[index]), labels[index], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.inference_mode()
def judge(model: Classifier, images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the predicted classes (N,) and features (N, FEATURES) of images (N, 16, 16)."""
    batches = -(-len(images) // BATCH)
    features = torch.cat([model.body(chunk) for chunk in _pixels(images).tensor_split(batches)])
    return model.last(features).argmax(dim=1).numpy(), features.numpy().astype(np.float64)


def save(model: Classifier, path: Path) -> None:
    """Write the weights to `path` atomically."""
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)


def load(path: Path) -> Classifier:
    """Load a classifier that `save` wrote."""
    model = Classifier()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def _pixels(images: NDArray[np.uint8]) -> Tensor:
    """Convert images: (N, 16, 16) uint8 → (N, 1, 16, 16) float32 in [-1, 1]."""
    return torch.from_numpy(images).unsqueeze(1).float() / 127.5 - 1
