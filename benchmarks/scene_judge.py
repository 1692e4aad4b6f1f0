"""Compare sets of pictures with their captions, and with drawn scenes."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import scene_reader
from benchmarks.glyph_metrics import Gaussian, frechet_distance
from benchmarks.scene_reader import Reader, Reading, read
from examples import scenes
from examples.scenes import DIRECTIONS, SIDE, Caption, Kind, draw, draw_caption
from examples.train_scenes import POOL, draw_scenes

READER_SEED = 101
REFERENCE_SEED = 103
"""Seeds of the reader's training drawings, and of the drawings that samples are compared with."""

MODEL_SEED = 0
"""Seed of the scenes that the reference model was trained on, the default of `train_scenes`."""

SMALL, LARGE = 23, 27
"""Sides in pixels up to which an object counts as small, and from which on as large."""

CATEGORIES: Mapping[str, tuple[Kind, bool, bool]] = {
    "single": ("single", False, False),
    "size": ("size", False, False),
    "colour": ("single", True, False),
    "counting": ("counting", False, False),
    "two": ("two", False, False),
    "three": ("three", False, False),
    "position": ("position", False, False),
    "two, unseen": ("two", False, True),
    "three, unseen": ("three", False, True),
    "position, unseen": ("position", False, True),
}
"""Kind of caption, whether it names the background, and whether its pair of objects is unseen.

The kinds are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513), with sizes and three objects.
"""

SEEN = ("two", "three", "position")
"""Categories of the accuracy of composition; each has a counterpart with unseen pairs."""

Pictures = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one set of pictures.

    correct: share of pictures that show what their caption says, by category.
    frechet: squared Fréchet distance of the reader's features to drawings of the same captions.
    spread: root mean square difference between two pictures of the same caption, in levels of 255.
    nearest: mean distance to the nearest of `POOL` training scenes, both at a quarter of the size,
    in root mean square levels.
    """

    correct: Mapping[str, float]
    frechet: float
    spread: float
    nearest: float

    @property
    def all(self) -> float:
        """Mean of all categories."""
        return float(np.mean(list(self.correct.values())))

    @property
    def seen(self) -> float:
        """Accuracy of composition for pairs that training shows."""
        return float(np.mean([self.correct[name] for name in SEEN]))

    @property
    def unseen(self) -> float:
        """Accuracy of composition for pairs that training does not show."""
        return float(np.mean([self.correct[f"{name}, unseen"] for name in SEEN]))


def draw_captions(count: int, seed: int) -> list[tuple[str, Caption]]:
    """Draw `count` captions of each category, with the category's name."""
    rng = np.random.default_rng(seed)
    return [
        (name, draw_caption(rng, kind, unseen=unseen, background=background))
        for name, (kind, background, unseen) in CATEGORIES.items()
        for _ in range(count)
    ]


def shows(reading: Reading, caption: Caption) -> bool:
    """Return whether a picture shows exactly what its caption says."""
    if Counter(placed.name for placed in reading.objects) != Counter(caption.names):
        return False
    placed = {one.name: one for one in reading.objects}
    for name, size in zip(caption.names, caption.sizes, strict=True):
        if (size == "small" and placed[name].side > SMALL) or (size == "large" and placed[name].side < LARGE):
            return False
    if caption.relation is not None:
        first, second = (placed[name] for name in caption.names)
        x, y = first.x - second.x, first.y - second.y
        dx, dy = DIRECTIONS[caption.relation]
        if x * dx + y * dy <= abs(x * dy) + abs(y * dx):
            return False
    wanted = caption.background
    return not wanted or reading.background == (wanted[0], wanted[-1])


@dataclass(frozen=True, slots=True)
class Judge:
    """A reader, and the drawn scenes that sets of pictures are compared with.

    drawn: features of drawings of the captions. training: training scenes (M, 768) at a quarter of
    the size. key: a hash of all that its figures depend on.
    """

    reader: Reader
    captions: Sequence[tuple[str, Caption]]
    drawn: Gaussian
    training: NDArray[np.float32]
    key: str

    @classmethod
    def of(cls, reader: Reader, captions: Sequence[tuple[str, Caption]], drawings: int) -> "Judge":
        """Build a judge of pictures of these captions.

        drawings: number of drawings of each caption that pictures are compared with.
        """
        rng = np.random.default_rng(REFERENCE_SEED)
        pictures = np.stack([draw(caption, rng).pixels for _, caption in captions for _ in range(drawings)])
        training, _ = draw_scenes(POOL, (MODEL_SEED, 3, 0))  # the first that the model was trained on
        digest = hashlib.sha256(f"{captions} {drawings}".encode() + pictures.tobytes() + training.tobytes())
        for weight in reader.state_dict().values():
            digest.update(weight.numpy().tobytes())
        drawn = Gaussian.of(read(reader, pictures)[1])
        return cls(reader, captions, drawn, _shrunk(training), digest.hexdigest())

    def figures(self, pictures: Pictures, each: int) -> Figures:
        """Measure pictures (N, 64, 64, 3).

        each: number of pictures of a caption. Those of the first caption come first, and so on.
        """
        readings, features = read(self.reader, pictures)
        right: dict[str, list[bool]] = {}
        for index, reading in enumerate(readings):
            name, caption = self.captions[index // each]
            right.setdefault(name, []).append(shows(reading, caption))
        by_caption = pictures.reshape(-1, each, *pictures.shape[1:]).astype(np.float64)
        spread = 0.0 if each == 1 else float(np.sqrt(2 * by_caption.var(axis=1, ddof=1).mean()))
        return Figures(
            correct={name: float(np.mean(shown)) for name, shown in right.items()},
            frechet=frechet_distance(Gaussian.of(features), self.drawn),
            spread=spread,
            nearest=float(_nearest(_shrunk(pictures), self.training).mean()),
        )


def _shrunk(pictures: Pictures) -> NDArray[np.float32]:
    """Average squares of 4 × 4 pixels: (N, 64, 64, 3) → (N, 768) float32."""
    side = SIDE // 4
    small: NDArray[np.float32] = pictures.reshape(-1, side, 4, side, 4, 3).mean(axis=(2, 4), dtype=np.float32)
    return small.reshape(len(pictures), -1)


def _nearest(points: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the distance of each point (N, D) to the nearest of the others (M, D): (N,)."""
    norms = np.einsum("md,md->m", others, others) / 2
    nearest = np.concatenate(
        [others[(norms - points[at : at + 256] @ others.T).argmin(axis=1)] for at in range(0, len(points), 256)]
    )
    distances: NDArray[np.float64] = np.sqrt(np.square(points - nearest, dtype=np.float64).mean(axis=1))
    return distances


def real_pictures(captions: Sequence[tuple[str, Caption]], each: int, seed: int) -> Pictures:
    """Draw `each` fresh scenes of every caption, in the order of `Judge.figures`."""
    rng = np.random.default_rng(seed)
    return np.stack([draw(caption, rng).pixels for _, caption in captions for _ in range(each)])


def cached_reader(folder: Path, steps: int) -> Reader:
    """Return the reader that is trained for `steps` steps; it is kept in `folder`."""
    sources = [Path(str(module.__file__)) for module in (scene_reader, scenes)]
    content = b"".join(path.read_bytes() for path in (*sources, scenes.SHEET))
    key = hashlib.sha256(content + f"{steps} {READER_SEED}".encode()).hexdigest()[:12]
    path = folder / f"scene-reader-{key}.pt"
    if not path.exists():
        scene_reader.save(scene_reader.train(steps, READER_SEED), path)
    return scene_reader.load(path)
