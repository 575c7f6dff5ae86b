"""The image's own file name as its caption: the last resort."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.captions.caption import Caption, parse_caption
from data.folder import Folder

SOURCE = "file name"


@dataclass(frozen=True)
class FileName:
    """The stem up to the first underscore: `a red cat_0012.jpg` is "a red cat"."""

    def read(self, image: Path, folder: Folder) -> Caption:
        """Return the caption; every image has a name, so there always is one."""
        return parse_caption(image.stem.split("_", 1)[0], SOURCE)
