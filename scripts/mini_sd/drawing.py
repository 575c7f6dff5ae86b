"""Drawing of scenes: flat shapes in eight colours on flat backgrounds, antialiased by supersampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Side of the model's images, in pixels."""

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
FACE, UMBRELLA = CONCEPTS = ("smiling face", "umbrella")
"""Concepts that the bundled model's training never shows."""

SUPERSAMPLING = 4

Size = Literal["", "small", "large"]


@dataclass(frozen=True)
class Item:
    """One object; `x`, `y` and `radius` are in units of the image's side."""

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


def draw_item(draw: ImageDraw.ImageDraw, item: Item, side: int) -> None:
    """Draw one object on a canvas of `side` pixels.

    Raises:
        KeyError: the shape or colour is not in the tables.
    """
    x, y, r = item.x * side, item.y * side, item.radius * side
    _DRAWERS[item.shape](draw, x, y, r, PALETTE[item.colour])


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Render a scene as an RGB image of `size` by `size` pixels."""
    side = size * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), PALETTE[scene.background])
    draw = ImageDraw.Draw(canvas)
    for item in scene.items:
        if item.shape == "ring":
            x, y, radius = item.x * side, item.y * side, item.radius * side
            _ring(draw, x, y, radius, PALETTE[item.colour], PALETTE[scene.background])
        else:
            draw_item(draw, item, side)
    return canvas.reduce(SUPERSAMPLING)


def to_array(images: list[Image.Image]) -> np.ndarray:
    """Stack RGB images as float32 of shape (B, 3, H, W) in -1..1."""
    stack = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2)) / 127.5 - 1.0


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


def _umbrella(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: _Colour) -> None:
    ink, wide, hook = PALETTE["black"], 0.12 * r, 0.22 * r
    draw.rectangle((x - wide / 2, y - r, x + wide / 2, y + 0.7 * r), fill=ink)
    low = y + 0.7 * r
    draw.arc(
        (x - 2 * hook, low - hook, x + wide / 2, low + hook), 0, 180, fill=ink, width=max(1, round(wide))
    )
    draw.pieslice((x - r, y - 0.9 * r, x + r, y + 1.1 * r), 180, 360, fill=fill)


_DRAWERS: dict[str, _Drawer] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "heart": _heart,
    "cross": _cross,
    FACE: _face,
    UMBRELLA: _umbrella,
}
