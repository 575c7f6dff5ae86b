"""A text file beside the image that holds its caption."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from data.captions.caption import Caption, parse_caption
from data.errors import FileError
from data.folder import Folder

LARGEST_TEXT = 1 << 20
"""Bytes; a longer file is not a caption."""

_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class TextFile:
    """The file of the image's name with another extension, `cat.txt` for `cat.jpg`."""

    suffix: str

    def read(self, image: Path, folder: Folder) -> Caption | None:
        """Return the caption, or None where the image has no such file.

        Raises:
            FileError: the file is there but cannot be read.
        """
        name = folder.beside(image, self.suffix)
        return None if name is None else parse_caption(read_text(folder.path / name), self.suffix)


def read_text(path: Path) -> str:
    """Return a text file's content, whichever of the usual encodings it is in.

    A byte-order mark decides; without one it is UTF-8 where that fits and Windows-1252, which extends Latin-1, where it does not.

    Raises:
        FileError: the file cannot be read, or is too long to be a caption.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise FileError(f"its caption file {path.name} cannot be read ({error.strerror})") from error
    if len(content) > LARGEST_TEXT:
        raise FileError(f"its caption file {path.name} is larger than 1 MiB, which is no caption")
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
