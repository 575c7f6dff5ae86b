"""Grids of images with labels and captions."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _MISSING = (255, 255, 255), (32, 32, 32), (110, 110, 110), (238, 228, 228)
_SMALLEST_SIDE = 256
_MOST_LINES = 4


def labelled_row(
    images: Sequence[Image.Image | str],
    labels: Sequence[str],
    caption: str,
    *,
    size: tuple[int, int] | None = None,
    most_lines: int = _MOST_LINES,
) -> Image.Image:
    """Return images of one size side by side, each under its label, over one wrapped caption.

    Small images are enlarged by a whole factor, so that a 64 px model's can be judged by eye.

    Args:
        images: a text replaces an image that could not be made.
        labels: long ones show their end; if all are empty, they take no space.
        caption: in any script of the font (Latin, Greek, Cyrillic and more); other letters become boxes.
        size: (width, height) of the images, to show them unscaled.
        most_lines: of the caption, before an ellipsis.
    """
    made = [image for image in images if not isinstance(image, str)]
    width, height = size or (made[0].size if made else (_SMALLEST_SIDE, _SMALLEST_SIDE))
    factor = 1 if size else max(1, -(-_SMALLEST_SIDE // min(width, height)))
    width, height = width * factor, height * factor
    letters, gap = max(14, width // 24), max(4, width // 48)
    full_width = len(images) * (width + gap) - gap

    font = _font(letters)
    lines = _wrap(caption, font, full_width, most_lines)
    line_height = round(letters * 1.3)
    top = line_height if any(labels) else 0
    row = Image.new("RGB", (full_width, top + height + gap // 2 + line_height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(row)

    def write(text: Sequence[str], x: float, y: float) -> None:
        for number, line in enumerate(text):
            draw.text((x, y + number * line_height), line, fill=_INK, font=font)

    for column, (image, label) in enumerate(zip(images, labels, strict=True)):
        x = column * (width + gap)
        draw.text((x + width / 2, top / 2), _ending(label, font, width), fill=_FAINT, font=font, anchor="mm")
        if isinstance(image, str):
            draw.rectangle((x, top, x + width - 1, top + height - 1), fill=_MISSING)
            write(_wrap(image, font, width - 2 * gap, height // line_height), x + gap, top + gap)
        else:
            image = image if factor == 1 else image.resize((width, height), Image.Resampling.LANCZOS)
            row.paste(image, (x, top))
    write(lines, 0, top + height + gap // 2)
    return row


def tiled(images: Sequence[Image.Image], *, columns: int, title: str) -> Image.Image:
    """Return images of any sizes in reading order under a title, `columns` of them in a row."""
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    widths = [
        max(row[column].width for row in rows if column < len(row))
        for column in range(min(columns, len(images)))
    ]
    size = gap = max(16, sum(widths) // 60)
    top = round(size * 2.2)
    heights = [max(image.height for image in row) for row in rows]
    width = sum(widths) + gap * (len(widths) + 1)
    grid = Image.new("RGB", (width, top + sum(heights) + gap * len(heights)), _PAPER)
    font = _font(size)
    line = (_wrap(title, font, width - 2 * gap, 1) or [""])[0]
    ImageDraw.Draw(grid).text((gap, top / 2), line, fill=_INK, font=font, anchor="lm")
    y = top
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for image, column_width in zip(row, widths, strict=False):
            grid.paste(image, (x, y))
            x += column_width + gap
        y += height + gap
    return grid


@cache
def _font(size: int) -> Any:
    """Return DejaVu Sans, which matplotlib brings and has many scripts, else Pillow's own, ASCII only."""
    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: float, most: int = _MOST_LINES) -> list[str]:
    """Break `text` into at most `most` lines of `width` pixels, ending in an ellipsis if cut."""
    lines: list[str] = []
    line = ""
    for word in [part for whole in text.split() for part in _split(whole, font, width)]:
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines += [line] if line else []
    if len(lines) > most > 0:
        lines = lines[:most]
        while lines[-1] and font.getlength(lines[-1] + " …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = f"{lines[-1].rstrip()} …"
    return lines[: max(most, 0)]


def _ending(text: str, font: Any, width: float) -> str:
    """Return the end of a text that fits on a line."""
    start = 0
    while start < len(text) and font.getlength(("…" if start else "") + text[start:]) > width:
        start += 1
    return ("…" if start else "") + text[start:]


def _split(word: str, font: Any, width: float) -> list[str]:
    """Cut a word that is longer than a line."""
    parts = []
    while font.getlength(word) > width and len(word) > 1:
        end = len(word) - 1
        while end > 1 and font.getlength(word[:end]) > width:
            end -= 1
        parts.append(word[:end])
        word = word[end:]
    return [*parts, word]
