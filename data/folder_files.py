"""Files that speak of all images of a folder: multiply.txt and its like, local.yaml, and global.yaml, which reaches below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.captions import Entry, Remark, first_setting, read_setting, read_text, read_yaml
from data.errors import FileError
from data.folder import Folder

_SETTING_FILES = (
    "multiply.txt",
    "cond_dropout.txt",
    "flip_p.txt",
    "loss_scale.txt",
    "batch_id.txt",
    "shuffle_tags.txt",
)
_LONGEST = 1 << 10
"""Bytes of a file that holds one value."""


def read_local(folder: Folder) -> tuple[Entry, ...]:
    """Return what is said of the images that lie in this very folder, in the order of precedence.

    Raises:
        FileError: a file cannot be used; the reason begins with its name.
    """
    written = [
        read_yaml(folder.path / name, "local.yaml")
        for kind in ("local.yaml", "local.yml")
        if (name := folder.own(kind))
    ]
    settings: dict[str, Any] = {}
    remarks: list[Remark] = []
    for file in _SETTING_FILES:
        if name := folder.own(file):
            key = file.removesuffix(".txt")
            settings[key] = _value(folder.path / name, key)
            other = first_setting(written, key)
            if other is not None and other != settings[key]:
                remarks.append(Remark(name, f"it says {settings[key]} and local.yaml {other}, which is used"))
        if name := folder.own(file + ".txt"):
            remarks.append(Remark(name, f"it is not read; did you mean {file}?"))
    return (*written, Entry(source="folder", remarks=tuple(remarks), **settings))


def read_global(folder: Folder) -> tuple[Entry, ...]:
    """Return what is said of the images in this folder and below it, in the order of precedence.

    Raises:
        FileError: a file cannot be used; the reason begins with its name.
    """
    return tuple(
        read_yaml(folder.path / name, "global.yaml")
        for kind in ("global.yaml", "global.yml")
        if (name := folder.own(kind))
    )


def _value(path: Path, key: str) -> Any:
    text = read_text(path, _LONGEST)
    if key == "shuffle_tags" and text.strip().lower() not in ("false", "no", "off", "0"):
        return True  # EveryDream2 looks no further than that the file is there
    try:
        return read_setting(key, text)
    except ValueError as error:
        raise FileError(f"{path.name}: {error}") from error
