"""The image's file name as its caption: the last resort."""

from __future__ import annotations

from data.captions.caption import Caption, parse_caption

SOURCE = "file name"


def from_file_name(stem: str) -> Caption:
    """Return the stem up to the first underscore: `a red cat_0012.jpg` is "a red cat"."""
    return parse_caption(stem.split("_", 1)[0], SOURCE)
