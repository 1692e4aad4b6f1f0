"""Scenes data set: one to three emoji on a coloured background, 64×64 pixels, with a caption.

A small grammar makes the captions: single objects, two and three objects, counts, positions, sizes
and backgrounds. `emoji.png` beside this file holds the objects, so the data set is the same on
every machine. A fifth of the pairs of objects, `UNSEEN_PAIRS`, is never drawn for training.

    python -m examples.scenes NotoColorEmoji.ttf    # make emoji.png anew from the font
"""

import sys
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Kind = Literal["single", "size", "two", "three", "counting", "position"]
Size = Literal["small", "large"]
Relation = Literal["left of", "right of", "above", "below"]

SIDE = 64
"""Height and width of a picture in pixels."""

OBJECTS = {
    "fox": "🦊",
    "frog": "🐸",
    "panda": "🐼",
    "crab": "🦀",
    "butterfly": "🦋",
    "apple": "🍎",
    "banana": "🍌",
    "mushroom": "🍄",
    "cactus": "🌵",
    "house": "🏠",
    "rocket": "🚀",
    "car": "🚗",
    "ball": "⚽",
    "star": "⭐",
    "heart": "❤",
    "umbrella": "☂",
}
"""Name and character of each object."""

NAMES = tuple(OBJECTS)

PLURALS = {
    name: {"fox": "foxes", "butterfly": "butterflies", "cactus": "cacti"}.get(name, f"{name}s") for name in NAMES
}

COLOURS = {
    "white": (244, 244, 240),
    "black": (44, 44, 52),
    "pink": (245, 178, 200),
    "yellow": (252, 222, 120),
    "green": (132, 200, 130),
    "blue": (112, 172, 228),
    "purple": (170, 132, 212),
    "orange": (240, 160, 96),
}
"""Colour of each background, RGB."""

COUNTS = {2: "two", 3: "three"}

DIRECTIONS: dict[Relation, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Direction from the second object to the first, (x, y); y points down."""

SIZES: dict[Size, tuple[int, int]] = {"small": (16, 19), "large": (30, 36)}
"""Smallest and largest side of an object of a named size, in pixels."""

ANY_SIZE = (20, 29)

UNSEEN_PAIRS = frozenset(
    frozenset((one, NAMES[(index + step) % len(NAMES)])) for index, one in enumerate(NAMES) for step in (5, 8)
)
"""Pairs of objects that no training picture shows together: 24 of 120, three of each object."""

KINDS: dict[Kind, float] = {
    "single": 0.2,
    "size": 0.1,
    "two": 0.2,
    "three": 0.1,
    "counting": 0.15,
    "position": 0.25,
}
"""Share of each kind of caption in training."""

WORDS = tuple(
    dict.fromkeys(
        [
            *("a", "an", "and", ",", "on", "over", "left", "right", "of", "above", "below", "small", "large"),
            *COUNTS.values(),
            *COLOURS,
            *NAMES,
            *PLURALS.values(),
        ]
    )
)
"""All words of the grammar."""

SHEET = Path(__file__).parent / "emoji.png"
_CELL = 96
_ANGLES = range(-20, 21, 5)


@dataclass(frozen=True, slots=True)
class Caption:
    """What a scene shows, as far as its caption says.

    kind: kind of caption. names: the objects, in order; a counted one is repeated. sizes: named
    size of each object, or None. relation: place of the first object relative to the second, or
    None. background: its colour, or the colours of its upper and its lower part; empty if the
    caption does not name it.
    """

    kind: Kind
    names: tuple[str, ...]
    sizes: tuple[Size | None, ...]
    relation: Relation | None = None
    background: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the text."""
        if self.kind == "counting":
            things = [f"{COUNTS[len(self.names)]} {PLURALS[self.names[0]]}"]
        else:
            things = [_noun(name, size) for name, size in zip(self.names, self.sizes, strict=True)]
        joint = f" {self.relation} " if self.relation else " and "
        text = joint.join([", ".join(things[:-1]), things[-1]]) if len(things) > 1 else things[0]
        return text + (f" on {' over '.join(self.background)}" if self.background else "")


@dataclass(frozen=True, slots=True)
class Placed:
    """An object in a scene: name, centre (x, y) and side of its square, in pixels."""

    name: str
    x: float
    y: float
    side: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn scene: pixels (64, 64, 3) uint8, its objects, and the colours of its background.

    background: the colours of the upper and of the lower part.
    """

    pixels: NDArray[np.uint8]
    objects: tuple[Placed, ...]
    background: tuple[str, str]


def draw_caption(
    rng: np.random.Generator, kind: Kind | None = None, *, unseen: bool = False, background: bool | None = None
) -> Caption:
    """Draw a caption.

    kind: None for a random kind. unseen: whether its pairs of objects are those that training does
    not see; kinds of one object ignore it. background: whether it names the background; None for
    every other caption.
    """
    chosen: Kind = kind or list(KINDS)[rng.choice(len(KINDS), p=list(KINDS.values()))]
    if background is None:
        background = rng.random() < 0.5
    colours: tuple[str, ...] = ()
    if background:
        colours = _two_colours(rng) if rng.random() < 0.4 else (_one_of(rng, list(COLOURS)),)
    if chosen in ("single", "size", "counting"):
        count = int(rng.choice(list(COUNTS))) if chosen == "counting" else 1
        size = _one_of(rng, list(SIZES)) if chosen == "size" else None
        return Caption(chosen, (_one_of(rng, NAMES),) * count, (size,) * count, None, colours)
    names = _draw_names(rng, 3 if chosen == "three" else 2, unseen)
    sizes: tuple[Size | None, ...] = (None,) * len(names)
    if chosen != "three" and rng.random() < 0.2:
        sizes = (("small", "large"), ("large", "small"))[rng.integers(2)]
    relation = _one_of(rng, list(DIRECTIONS)) if chosen == "position" else None
    return Caption(chosen, names, sizes, relation, colours)


def draw(caption: Caption, rng: np.random.Generator) -> Scene:
    """Draw a scene that the caption is true of. What the caption leaves open is random."""
    colours = caption.background or (_two_colours(rng) if rng.random() < 0.3 else (_one_of(rng, list(COLOURS)),))
    pixels = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:] = COLOURS[colours[0]]
    pixels[int(rng.integers(26, 39)) :] = COLOURS[colours[-1]]
    largest = ANY_SIZE[1] if len(caption.names) < 3 else 26
    sides = [
        int(rng.integers(*(SIZES[size] if size else (ANY_SIZE[0], largest)), endpoint=True)) for size in caption.sizes
    ]
    objects = tuple(
        Placed(name, x, y, side)
        for name, side, (x, y) in zip(caption.names, sides, _places(rng, sides, caption.relation), strict=True)
    )
    for placed in objects:
        sprite = _sprite(placed.name, placed.side, int(rng.integers(len(_ANGLES))), bool(rng.integers(2)))
        top, left = round(placed.y - placed.side / 2), round(placed.x - placed.side / 2)
        under = pixels[top : top + placed.side, left : left + placed.side]
        alpha = sprite[..., 3:].astype(np.uint16)
        under[:] = ((sprite[..., :3] * alpha + under * (255 - alpha) + 127) // 255).astype(np.uint8)
    return Scene(pixels, objects, (colours[0], colours[-1]))


def _places(rng: np.random.Generator, sides: list[int], relation: Relation | None) -> list[tuple[float, float]]:
    """Draw centres (x, y) of squares apart from each other, clearly placed if related."""
    while True:
        at = [(rng.uniform(side / 2, SIDE - side / 2), rng.uniform(side / 2, SIDE - side / 2)) for side in sides]
        if relation is not None:
            dx, dy = DIRECTIONS[relation]
            x, y = at[0][0] - at[1][0], at[0][1] - at[1][1]
            if abs(x * dy) + abs(y * dx) > 0.6 * (x * dx + y * dy):
                continue
        if all(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) > 0.47 * (one + other)
            for (a, one), (b, other) in combinations(zip(at, sides, strict=True), 2)
        ):
            return at


def _draw_names(rng: np.random.Generator, count: int, unseen: bool) -> tuple[str, ...]:
    """Draw objects, no two alike; `unseen`: whether one of their pairs, or none, is unseen."""
    while True:
        names = tuple(NAMES[index] for index in rng.choice(len(NAMES), size=count, replace=False))
        if any(frozenset(pair) in UNSEEN_PAIRS for pair in combinations(names, 2)) == unseen:
            return names


def _two_colours(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(list(COLOURS)[index] for index in rng.choice(len(COLOURS), size=2, replace=False))


def _one_of(rng: np.random.Generator, values):  # type: ignore[no-untyped-def]
    return values[rng.integers(len(values))]


def _noun(name: str, size: Size | None) -> str:
    words = f"{size} {name}" if size else name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@cache
def _cells() -> dict[str, Image.Image]:
    with Image.open(SHEET) as sheet:
        sheet.load()
        return {name: sheet.crop((index * _CELL, 0, (index + 1) * _CELL, _CELL)) for index, name in enumerate(NAMES)}


@cache
def _sprite(name: str, side: int, angle: int, flipped: bool) -> NDArray[np.uint8]:
    """Return an object's pixels (side, side, 4) RGBA."""
    cell = _cells()[name]
    if flipped:
        cell = cell.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = cell.convert("RGBa").rotate(_ANGLES[angle], Image.Resampling.BICUBIC)
    return np.asarray(turned.resize((side, side), Image.Resampling.BOX).convert("RGBA"))


def make_sheet(font: Path) -> None:
    """Write `emoji.png`, a row of all objects, from the font Noto Color Emoji."""
    face = ImageFont.truetype(str(font), 109)  # the only size of its bitmaps
    sheet = Image.new("RGBA", (_CELL * len(NAMES), _CELL))
    for index, character in enumerate(OBJECTS.values()):
        glyph = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(glyph).text((0, 0), character, font=face, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        glyph.thumbnail((_CELL - 12, _CELL - 12), Image.Resampling.LANCZOS)
        left, top = (_CELL - glyph.width) // 2, (_CELL - glyph.height) // 2
        sheet.paste(glyph, (index * _CELL + left, top))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    make_sheet(Path(sys.argv[1]))
