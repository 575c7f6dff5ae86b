"""The image's file name as its caption: the last resort."""

from __future__ import annotations

import re

from data.captions.caption import Caption, parse_caption

SOURCE = "file name"

_UNNAMED = re.compile(
    r"(?:(?:img|image|dsc[nf]?|dcim|pict?|picture|photo|pxl|mvimg|gopr|gx|vid|scan|screenshot|unnamed|untitled"
    r"|download|whatsapp image|p(?=\d{5}))?(?:[\s\d().:-]|\bat\b|wa(?=\d))*"
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{12,})",
    re.IGNORECASE,
)
"""Names that cameras, downloads and hashes give, and numbers alone."""


def from_file_name(stem: str) -> Caption:
    """Return the stem up to the first underscore: `a red cat_0012.jpg` is "a red cat"."""
    return parse_caption(stem.split("_", 1)[0], SOURCE)


def describes_nothing(caption: str) -> bool:
    """Return whether a caption is a name that a camera or a program gave: "IMG", "DSC01234", "0001"."""
    return bool(caption) and _UNNAMED.fullmatch(caption) is not None
