"""Images of textures and marks, for the VAE alone."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from .drawing import COLOURS, IMAGE_SIZE, PALETTE, SHAPES, SUPERSAMPLING, Item, draw_item, render
from .scenes import pick, sample_scene


def sample_texture(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw polygons, lines, stripes, dots and ovals in any colours, so that the VAE generalizes."""
    side = size * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), _any_colour(rng))
    draw = ImageDraw.Draw(canvas)
    kind = rng.integers(4)
    if kind == 0:
        _stripes(draw, side, rng)
    for _ in range(rng.integers(2, 7)):
        _random_mark(draw, side, rng, fine=bool(kind >= 2))
    return canvas.reduce(SUPERSAMPLING)


def sample_marked(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene with a few small marks, for the VAE's fine detail on flat areas."""
    side = size * SUPERSAMPLING
    canvas = render(sample_scene(rng, two_objects=0.0), side)
    draw = ImageDraw.Draw(canvas)
    ink = PALETTE[pick(rng, COLOURS)]
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
    return canvas.reduce(SUPERSAMPLING)


def _any_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < 0.5:
        return PALETTE[pick(rng, COLOURS)]
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
        item = Item(pick(rng, SHAPES[:5]), pick(rng, COLOURS), x / side, y / side, r / side)
        draw_item(draw, item, side)
