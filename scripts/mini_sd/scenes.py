"""Random captioned scenes, and the combinations that training never shows.

Every random draw comes from the caller's `numpy.random.Generator`, so a scene is a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .drawing import COLOURS, FACE, IMAGE_SIZE, SHAPES, Item, Scene, Size

HELD_OUT_COUNT = 100
_SPLIT_SEED = 2311

_T = TypeVar("_T")

RADII: dict[Size, tuple[float, float]] = {"small": (10.5, 13.0), "": (14.5, 20.5), "large": (22.0, 26.0)}
"""Half the side of an object's box by size word, in pixels of a 64-pixel image."""


@dataclass(frozen=True)
class Combination:
    """An object's colour and shape and the background's colour: the unit of the split."""

    colour: str
    shape: str
    background: str

    @property
    def prompt(self) -> str:
        """The judge's prompt."""
        thing, ground = f"{self.colour} {self.shape}", f"{self.background} background"
        return f"{article(thing)} {thing} on {article(ground)} {ground}"


def article(word: str) -> str:
    """Return "a" or "an", by the first letter."""
    return "an" if word[0] in "aeiou" else "a"


def combinations() -> list[Combination]:
    """Return all 336 combinations, in a fixed order; object and background never share a colour."""
    return [Combination(c, s, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]


def held_out() -> tuple[Combination, ...]:
    """Return the 100 combinations that training never shows; they cover shapes and colours evenly."""
    rng = np.random.default_rng(_SPLIT_SEED)
    pools = [[c for c in combinations() if c.shape == shape] for shape in SHAPES]
    shuffled = [[pool[i] for i in rng.permutation(len(pool))] for pool in pools]
    in_turn = [c for row in zip(*shuffled, strict=True) for c in row]
    return tuple(in_turn[:HELD_OUT_COUNT])


def sample_scene(rng: np.random.Generator, two_objects: float = 0.2) -> Scene:
    """Draw a training scene without held-out combinations and the concept.

    Args:
        two_objects: the share of scenes with two smaller objects.
    """
    while True:
        background = pick(rng, COLOURS)
        scene = _two_items(rng, background) if rng.random() < two_objects else _one_item(rng, background)
        if not any(Combination(i.colour, i.shape, background) in _HELD_OUT for i in scene.items):
            return scene


def scene_of(combination: Combination, rng: np.random.Generator, size: Size = "") -> Scene:
    """Draw a single-object scene of a given combination."""
    return Scene(combination.background, (_place(rng, combination.shape, combination.colour, size),))


def sample_concept(rng: np.random.Generator, concept: str) -> tuple[Scene, str]:
    """Draw a bright smiling face, or an umbrella of any colour but its stick's, with its caption."""
    if concept == FACE:
        colours, grounds = tuple(c for c in COLOURS if c in ("red", "yellow", "orange", "white")), COLOURS
    else:
        colours = grounds = tuple(c for c in COLOURS if c != "black")
    colour = pick(rng, colours)
    background = pick(rng, tuple(c for c in grounds if c != colour))
    radius = rng.uniform(20.5, 26.5) / IMAGE_SIZE
    room = min(0.5 - radius - 0.03, 0.1)
    item = Item(concept, colour, 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room), radius)
    scene = Scene(background, (item,))
    return scene, caption(scene, rng)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in one of four ways, in lower case; half the captions are worded as prompts."""
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


def pick(rng: np.random.Generator, options: tuple[_T, ...]) -> _T:
    """Draw one of the options."""
    return options[int(rng.integers(len(options)))]


def _place(rng: np.random.Generator, shape: str, colour: str, size: Size) -> Item:
    radius = rng.uniform(*RADII[size]) / IMAGE_SIZE
    room = min(0.5 - radius - 0.05, 0.12)
    return Item(shape, colour, 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room), radius, size)


def _one_item(rng: np.random.Generator, background: str) -> Scene:
    colour = pick(rng, tuple(c for c in COLOURS if c != background))
    sizes: tuple[Size, ...] = ("", "", "", "small", "large")
    return Scene(background, (_place(rng, pick(rng, SHAPES), colour, pick(rng, sizes)),))


def _two_items(rng: np.random.Generator, background: str) -> Scene:
    free = [c for c in COLOURS if c != background]
    first, second = (free[i] for i in rng.choice(len(free), 2, replace=False))
    items = []
    for colour, centre in ((first, 0.27), (second, 0.73)):
        radius = rng.uniform(11.0, 13.5) / IMAGE_SIZE
        y = 0.5 + rng.uniform(-0.12, 0.12)
        items.append(Item(pick(rng, SHAPES), colour, centre + rng.uniform(-0.02, 0.02), y, radius))
    return Scene(background, tuple(items))


_HELD_OUT = frozenset(held_out())
