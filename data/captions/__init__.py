"""Where captions come from. A new source is a file here, a member of the union and a place in the chain."""

from __future__ import annotations

from pathlib import Path

from data.captions.caption import Caption, Tag, parse_caption, render
from data.captions.file_name import SOURCE as FILE_NAME
from data.captions.file_name import FileName
from data.captions.text import TextFile
from data.folder import Folder

CaptionSource = TextFile | FileName

CHAIN: tuple[CaptionSource, ...] = (TextFile(".caption"), TextFile(".txt"), FileName())
"""Asked in this order; the first that has a caption for the image wins."""


def find_caption(image: Path, folder: Folder) -> Caption:
    """Return the caption of an image, from the first source that has one.

    Raises:
        FileError: the image has a caption file that cannot be read.
    """
    for source in CHAIN:
        caption = source.read(image, folder)
        if caption is not None:
            return caption
    raise AssertionError("the chain ends in the file name, which every image has")


__all__ = ["CHAIN", "FILE_NAME", "Caption", "CaptionSource", "FileName", "Tag", "TextFile", "find_caption", "parse_caption", "render"]
