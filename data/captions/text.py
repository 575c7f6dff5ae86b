"""A text file beside the image that holds its caption."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from data.captions.caption import parse_caption
from data.captions.entry import Entry, Remark
from data.errors import FileError
from data.folder import Folder
from data.regular import open_regular

LARGEST_TEXT = 1 << 20
"""Bytes; a longer file is not a caption."""

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class TextFile:
    """The file of the image's name with another extension, `cat.txt` for `cat.jpg`."""

    suffix: str
    lines: bool = False
    """Whether each line is a caption of its own."""
    first: bool = False
    """Whether the first line alone is the caption unless `lines` is set, as kohya's scripts read it."""

    def read(self, stem: str, folder: Folder) -> Entry | None:
        """Return the caption, or None where there is none.

        Raises:
            FileError: the file is there but cannot be read.
        """
        name = folder.beside(stem, self.suffix)
        if name is None:
            return None
        text = read_text(folder.path / name)
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            return Entry(captions=(parse_caption(text, self.suffix),), source=self.suffix)
        if self.lines:
            return Entry(
                captions=tuple(parse_caption(line, self.suffix) for line in lines), source=self.suffix
            )
        if self.first:
            unread = Remark(
                name,
                "its first line is the caption, as in kohya's scripts; with caption_lines a line is drawn each time",
            )
            return Entry(
                captions=(parse_caption(lines[0], self.suffix),), source=self.suffix, remarks=(unread,)
            )
        joined = Remark(
            name,
            "its lines are joined into one caption; with caption_lines one of them would be drawn each time",
        )
        return Entry(captions=(parse_caption(text, self.suffix),), source=self.suffix, remarks=(joined,))


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Return a text file's content, whichever of the usual encodings it is in.

    A byte-order mark decides; without one it is UTF-8 where that fits and Windows-1252, which extends
    Latin-1, where it does not.

    Raises:
        FileError: the file cannot be read, or is larger than `largest` bytes.
    """
    try:
        with open_regular(path) as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise FileError(f"{path.name}: cannot be read ({error.strerror})") from error
    if len(content) > largest:
        raise FileError(f"{path.name}: is larger than {largest >> 10} KiB, which is too much for what it is")
    return _decode(content)


def _decode(content: bytes) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")
