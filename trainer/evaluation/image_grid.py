"""Pictures beside each other with words under them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

_PAPER, _INK, _FAINT, _MISSING = (255, 255, 255), (32, 32, 32), (110, 110, 110), (238, 228, 228)
_SMALLEST_SIDE = 256  # smaller pictures are enlarged by a whole factor
_MOST_LINES = 4


def labelled_row(
    pictures: Sequence[Image.Image | str],
    labels: Sequence[str],
    caption: str,
    *,
    size: tuple[int, int] | None = None,
    most_lines: int = _MOST_LINES,
) -> Image.Image:
    """Return pictures side by side, each under its label, over one caption as wide as all of them.

    Small pictures are enlarged by a whole factor, so that a 64 px model's can be judged by eye. Captions
    wrap.

    Args:
        pictures: pictures, or, in the place of one that could not be made, the reason. Those of a row have
        one size.
        labels: a short text for each, of which the end is shown where it is too long; all empty leaves no
        room for them.
        caption: what the row shows, in any script the font has (Latin, Greek, Cyrillic and more); other
        characters become boxes.
        size: (width, height) of the pictures, to show them as they are.
        most_lines: of the caption; an ellipsis stands for the rest.
    """
    from PIL import Image, ImageDraw

    made = [picture for picture in pictures if not isinstance(picture, str)]
    width, height = size or (made[0].size if made else (_SMALLEST_SIDE, _SMALLEST_SIDE))
    factor = 1 if size else max(1, -(-_SMALLEST_SIDE // min(width, height)))
    width, height = width * factor, height * factor
    letters, gap = max(14, width // 24), max(4, width // 48)
    full_width = len(pictures) * (width + gap) - gap

    font = _font(letters)
    lines = _wrap(caption, font, full_width, most_lines)
    line_height = round(letters * 1.3)
    top = line_height if any(labels) else 0
    row = Image.new("RGB", (full_width, top + height + gap // 2 + line_height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(row)
    for column, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x = column * (width + gap)
        draw.text((x + width / 2, top / 2), _ending(label, font, width), fill=_FAINT, font=font, anchor="mm")
        if isinstance(picture, str):
            draw.rectangle((x, top, x + width - 1, top + height - 1), fill=_MISSING)
            for number, line in enumerate(_wrap(picture, font, width - 2 * gap, height // line_height)):
                draw.text((x + gap, top + gap + number * line_height), line, fill=_INK, font=font)
        else:
            row.paste(
                picture if factor == 1 else picture.resize((width, height), Image.Resampling.LANCZOS),
                (x, top),
            )
    for number, line in enumerate(lines):
        draw.text((0, top + height + gap // 2 + number * line_height), line, fill=_INK, font=font)
    return row


def tiled(pictures: Sequence[Image.Image], *, columns: int, title: str) -> Image.Image:
    """Return pictures of any sizes in reading order, `columns` of them in a line, under a title."""
    from PIL import Image, ImageDraw

    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    widths = [
        max(row[column].width for row in rows if column < len(row))
        for column in range(min(columns, len(pictures)))
    ]
    size = max(16, sum(widths) // 60)
    gap = size
    top = round(size * 2.2)
    heights = [max(picture.height for picture in row) for row in rows]
    grid = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) + 1), top + sum(heights) + gap * len(heights)), _PAPER
    )
    font = _font(size)
    ImageDraw.Draw(grid).text(
        (gap, top / 2),
        (_wrap(title, font, grid.width - 2 * gap, 1) or [""])[0],
        fill=_INK,
        font=font,
        anchor="lm",
    )
    y = top
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for picture, width in zip(row, widths, strict=False):
            grid.paste(picture, (x, y))
            x += width + gap
        y += height + gap
    return grid


@cache
def _font(size: int) -> Any:
    """Return DejaVu Sans, which comes with matplotlib and has many scripts, or else Pillow's own font, which has ASCII only."""
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: float, most: int = _MOST_LINES) -> list[str]:
    """Return `text` in lines of at most `width` pixels; what is over the most lines ends in an ellipsis."""
    lines: list[str] = []
    line = ""
    words = [piece for word in text.split() for piece in _pieces(word, font, width)]
    for word in words:
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
    """Return as much of the end of a text as fits on a line."""
    start = 0
    while start < len(text) and font.getlength(("…" if start else "") + text[start:]) > width:
        start += 1
    return ("…" if start else "") + text[start:]


def _pieces(word: str, font: Any, width: float) -> list[str]:
    """Cut a word that is longer than a line."""
    pieces = []
    while font.getlength(word) > width and len(word) > 1:
        end = len(word) - 1
        while end > 1 and font.getlength(word[:end]) > width:
            end -= 1
        pieces.append(word[:end])
        word = word[end:]
    return [*pieces, word]
