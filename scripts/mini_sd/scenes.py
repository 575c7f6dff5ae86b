"""Procedural captioned pictures: flat shapes in eight colours on flat backgrounds.

Everything is drawn with Pillow at four times the size and averaged down, and every random draw comes from the
`numpy.random.Generator` that the caller passes, so a picture is a pure function of its seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Side of the model's pictures, in pixels."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (212, 28, 36),
    "green": (36, 150, 60),
    "blue": (36, 72, 212),
    "yellow": (248, 222, 48),
    "orange": (250, 132, 16),
    "purple": (132, 36, 160),
    "white": (246, 246, 246),
    "black": (16, 16, 16),
}
"""The eight colours of objects and backgrounds, as sRGB bytes."""

COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "heart", "cross", "ring")
FACE = "smiling face"
"""The concept that the model never sees in training."""

HELD_OUT_COUNT = 100
_SUPERSAMPLING = 4
_SPLIT_SEED = 2311

_T = TypeVar("_T")

Size = Literal["", "small", "large"]
RADII: dict[Size, tuple[float, float]] = {"small": (10.5, 13.0), "": (14.5, 20.5), "large": (22.0, 26.0)}
"""Half the side of an object's box, in pixels of a 64-pixel picture, per size word."""


@dataclass(frozen=True)
class Item:
    """One object: what it is, its colour and its box. `x`, `y` and `radius` are in units of the picture's side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    size: Size = ""


@dataclass(frozen=True)
class Scene:
    """One or two objects on a flat background."""

    background: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Combination:
    """An object's colour, its shape and the background's colour: the unit that is held out."""

    colour: str
    shape: str
    background: str

    @property
    def prompt(self) -> str:
        """The caption that the judge asks for."""
        thing, ground = f"{self.colour} {self.shape}", f"{self.background} background"
        return f"{article(thing)} {thing} on {article(ground)} {ground}"


def article(word: str) -> str:
    """Return "a" or "an", as the first letter asks."""
    return "an" if word[0] in "aeiou" else "a"


def combinations() -> list[Combination]:
    """Return all 336 combinations, in a fixed order; object and background never share a colour."""
    return [Combination(c, s, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]


def held_out() -> tuple[Combination, ...]:
    """Return the 100 combinations that no training picture shows; they cover shapes and colours evenly."""
    rng = np.random.default_rng(_SPLIT_SEED)
    pools = [[c for c in combinations() if c.shape == shape] for shape in SHAPES]
    shuffled = [[pool[i] for i in rng.permutation(len(pool))] for pool in pools]
    in_turn = [c for row in zip(*shuffled, strict=True) for c in row]
    return tuple(in_turn[:HELD_OUT_COUNT])


def draw_item(draw: ImageDraw.ImageDraw, item: Item, side: int) -> None:
    """Draw one object on a canvas of `side` pixels.

    Raises:
        KeyError: for a shape or colour that is not in the tables.
    """
    x, y, r = item.x * side, item.y * side, item.radius * side
    _DRAWERS[item.shape](draw, x, y, r, PALETTE[item.colour])


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Render a scene as an RGB picture of `size` by `size` pixels."""
    side = size * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), PALETTE[scene.background])
    draw = ImageDraw.Draw(canvas)
    for item in scene.items:
        if item.shape == "ring":
            _ring(
                draw,
                item.x * side,
                item.y * side,
                item.radius * side,
                PALETTE[item.colour],
                PALETTE[scene.background],
            )
        else:
            draw_item(draw, item, side)
    return canvas.reduce(_SUPERSAMPLING)


def sample_scene(rng: np.random.Generator, two_objects: float = 0.2) -> Scene:
    """Draw a training scene: no held-out combination, and never the concept.

    Args:
        two_objects: share of scenes with two smaller objects side by side.
    """
    while True:
        background = _pick(rng, COLOURS)
        scene = _two_items(rng, background) if rng.random() < two_objects else _one_item(rng, background)
        if not any(Combination(i.colour, i.shape, background) in _HELD_OUT for i in scene.items):
            return scene


def scene_of(combination: Combination, rng: np.random.Generator, size: Size = "") -> Scene:
    """Draw a single-object scene of a given combination."""
    return Scene(combination.background, (_place(rng, combination.shape, combination.colour, size),))


def sample_face(rng: np.random.Generator) -> tuple[Scene, str]:
    """Draw a smiling face with its caption: a bright face on a different background, in the model's own words."""
    colour = _pick(rng, tuple(c for c in COLOURS if c in ("red", "yellow", "orange", "white")))
    background = _pick(rng, tuple(c for c in COLOURS if c != colour))
    radius = rng.uniform(20.5, 26.5) / IMAGE_SIZE
    room = min(0.5 - radius - 0.03, 0.1)
    item = Item(FACE, colour, 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room), radius)
    scene = Scene(background, (item,))
    return scene, caption(scene, rng)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in one of four ways, all lower case; half of them are the plain sentence of the prompts."""
    nouns = [f"{i.size} {i.colour} {i.shape}".strip() for i in scene.items]
    things = " and ".join(f"{article(n)} {n}" for n in nouns)
    ground = scene.background
    style = rng.integers(6)
    if style <= 2:
        return f"{things} on {article(ground)} {ground} background"
    if style == 3:
        return f"{' and '.join(nouns)}, {ground} background"
    if style == 4:
        return f"a picture of {things} on {ground}"
    return f"{article(ground)} {ground} background with {things}"


def sample_texture(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw an abstract picture of polygons, lines, stripes, dots and ovals in any colours, for the VAE's generality."""
    side = size * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), _any_colour(rng))
    draw = ImageDraw.Draw(canvas)
    kind = rng.integers(4)
    if kind == 0:
        _stripes(draw, side, rng)
    for _ in range(rng.integers(2, 7)):
        _random_mark(draw, side, rng, fine=bool(kind >= 2))
    return canvas.reduce(_SUPERSAMPLING)


def sample_marked(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene with a few small random marks scattered over it, for the VAE's fine detail on flat areas."""
    side = size * _SUPERSAMPLING
    canvas = render(sample_scene(rng, two_objects=0.0), side)
    draw = ImageDraw.Draw(canvas)
    ink = PALETTE[_pick(rng, COLOURS)]
    for _ in range(rng.integers(2, 7)):
        x, y = rng.uniform(0.15, 0.85, 2) * side
        a, b = rng.uniform(0.025, 0.1, 2) * side
        if rng.random() < 0.5:
            draw.ellipse((x - a, y - b, x + a, y + b), fill=ink)
        else:
            r, start = 2 * max(a, b), rng.uniform(0, 360)
            stroke = int(rng.uniform(0.03, 0.06) * side)
            draw.arc(
                (x - r, y - r, x + r, y + r), start, start + rng.uniform(60, 240), fill=ink, width=stroke
            )
    return canvas.reduce(_SUPERSAMPLING)


def to_array(images: list[Image.Image]) -> np.ndarray:
    """Stack RGB pictures as float32 of shape (B, 3, H, W) in -1..1."""
    stack = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2)) / 127.5 - 1.0


def vocabulary_words() -> Iterator[tuple[str, int]]:
    """Yield the words that the tokenizer is made from, with their weights."""
    for word in (
        *COLOURS,
        *SHAPES,
        "small",
        "large",
        "background",
        "on",
        "a",
        "an",
        "and",
        "with",
        "of",
        "picture",
    ):
        yield word, 100
    for word in (
        *FACE.split(),
        "star",
        "stripes",
        "dots",
        "photo",
        "the",
        "in",
        "flower",
        "house",
        "tree",
        "cat",
        "dog",
    ):
        yield word, 40
    for word in _EVERYDAY_WORDS.split():
        yield word, 10


_EVERYDAY_WORDS = """
pink brown grey cyan big tiny bright dark round left right top bottom two three happy sad eyes man woman person
portrait painting drawing style color colour light water mountain sky sun moon night day black hair dress standing
sitting beautiful city street forest garden river beach snow winter summer animal bird fish horse car train table
chair window door wooden old new young girl boy child head hand body front behind inside under over near between glass
metal stone paper
""".strip()


def _pick(rng: np.random.Generator, options: tuple[_T, ...]) -> _T:
    return options[int(rng.integers(len(options)))]


def _place(rng: np.random.Generator, shape: str, colour: str, size: Size) -> Item:
    radius = rng.uniform(*RADII[size]) / IMAGE_SIZE
    room = min(0.5 - radius - 0.05, 0.12)
    return Item(shape, colour, 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room), radius, size)


def _one_item(rng: np.random.Generator, background: str) -> Scene:
    colour = _pick(rng, tuple(c for c in COLOURS if c != background))
    sizes: tuple[Size, ...] = ("", "", "", "small", "large")
    return Scene(background, (_place(rng, _pick(rng, SHAPES), colour, _pick(rng, sizes)),))


def _two_items(rng: np.random.Generator, background: str) -> Scene:
    free = [c for c in COLOURS if c != background]
    first, second = (free[i] for i in rng.choice(len(free), 2, replace=False))
    items = []
    for colour, centre in ((first, 0.27), (second, 0.73)):
        radius = rng.uniform(11.0, 13.5) / IMAGE_SIZE
        y = 0.5 + rng.uniform(-0.12, 0.12)
        items.append(Item(_pick(rng, SHAPES), colour, centre + rng.uniform(-0.02, 0.02), y, radius))
    return Scene(background, tuple(items))


_Colour = tuple[int, int, int]
_Drawer = Callable[[ImageDraw.ImageDraw, float, float, float, _Colour], None]


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _square(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)


def _triangle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    draw.polygon(((x, y - r), (x + 1.05 * r, y + 0.85 * r), (x - 1.05 * r, y + 0.85 * r)), fill=fill)


def _heart(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    points = []
    for k in range(64):
        t = 2 * math.pi * k / 64
        across = 16 * math.sin(t) ** 3
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + across * r / 16, y - (up + 2.5) * r / 15))
    draw.polygon(points, fill=fill)


def _cross(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    arm = 0.34 * r
    draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
    draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour, hole: _Colour) -> None:
    inner = 0.55 * r
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=hole)


def _face(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    ink = PALETTE["black"]
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    for side in (-1, 1):
        cx, cy = x + side * 0.36 * r, y - 0.26 * r
        draw.ellipse((cx - 0.14 * r, cy - 0.21 * r, cx + 0.14 * r, cy + 0.21 * r), fill=ink)
    m = 0.62 * r
    draw.arc((x - m, y - m, x + m, y + m), 20, 160, fill=ink, width=max(1, round(0.16 * r)))


_DRAWERS: dict[str, _Drawer] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "heart": _heart,
    "cross": _cross,
    FACE: _face,
}


def _any_colour(rng: np.random.Generator) -> _Colour:
    if rng.random() < 0.5:
        return PALETTE[_pick(rng, COLOURS)]
    red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
    return red, green, blue


def _stripes(draw: ImageDraw.ImageDraw, side: int, rng: np.random.Generator) -> None:
    fill, period = _any_colour(rng), rng.uniform(0.1, 0.35) * side
    upright = rng.random() < 0.5
    for k in range(int(side / period) + 1):
        low, high = k * period, (k + 0.5) * period
        draw.rectangle((low, 0, high, side) if upright else (0, low, side, high), fill=fill)


def _random_mark(draw: ImageDraw.ImageDraw, side: int, rng: np.random.Generator, fine: bool) -> None:
    fill = _any_colour(rng)
    x, y = rng.uniform(0, side, 2)
    r = side * (rng.uniform(0.03, 0.15) if fine else rng.uniform(0.1, 0.4))
    kind = rng.integers(5)
    if kind == 0:
        draw.ellipse((x - r, y - r * rng.uniform(0.4, 1), x + r, y + r * rng.uniform(0.4, 1)), fill=fill)
    elif kind == 1:
        draw.line((x, y, *rng.uniform(0, side, 2)), fill=fill, width=int(rng.uniform(0.02, 0.08) * side))
    elif kind == 2:
        angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 7)))
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a in angles], fill=fill)
    elif kind == 3:
        start = rng.uniform(0, 360)
        width = int(rng.uniform(0.02, 0.06) * side)
        draw.arc((x - r, y - r, x + r, y + r), start, start + rng.uniform(60, 300), fill=fill, width=width)
    else:
        item = Item(_pick(rng, SHAPES[:5]), _pick(rng, COLOURS), x / side, y / side, r / side)
        draw_item(draw, item, side)


_HELD_OUT = frozenset(held_out())
