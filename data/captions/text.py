"""A text file beside the image with its caption."""

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
    """The file with the image's name and another extension, `cat.txt` for `cat.jpg`."""

    suffix: str
    lines: bool = False
    """Take each line as a caption of its own."""
    first: bool = False
    """Unless `lines` is set, take the first line alone, as kohya's scripts do."""

    def read(self, stem: str, folder: Folder) -> Entry | None:
        """Read the caption, if there is one."""
        name = folder.beside(stem, self.suffix)
        if name is None:
            return None
        text = read_text(folder.path / name)
        if "\0" in text:
            raise FileError(f"{name}: holds zero bytes, so it is no text in UTF-8; save it as that")
        lines = [line for line in text.splitlines() if line.strip()]
        texts, remark = [text], ""
        if len(lines) > 1 and self.lines:
            texts = lines
        elif len(lines) > 1 and self.first:
            texts = lines[:1]
            remark = (
                "its first line is the caption, as in kohya's scripts; with caption_lines a line is "
                "drawn each time"
            )
        elif len(lines) > 1:
            remark = (
                "its lines are joined into one caption; with caption_lines one of them would be "
                "drawn each time"
            )
        return Entry(
            captions=tuple(parse_caption(each, self.suffix) for each in texts),
            source=self.suffix,
            remarks=(Remark(name, remark),) if remark else (),
        )


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Decode a text file by its byte-order mark, else as UTF-8, else as Windows-1252 or Latin-1."""
    try:
        with open_regular(path) as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise FileError(f"{path.name}: cannot be read ({error.strerror})") from error
    if len(content) > largest:
        raise FileError(f"{path.name}: is larger than {largest >> 10} KiB, which is too much for what it is")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")
