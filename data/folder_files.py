"""Files about all images of a folder: multiply.txt and its like, local.yaml, and inherited global.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.captions.entry import Entry, Remark, first_setting, read_setting
from data.captions.text import read_text
from data.captions.yaml_file import read_yaml
from data.errors import FileError
from data.folder import Folder

_SETTINGS = ("multiply", "cond_dropout", "flip_p", "loss_scale", "batch_id", "shuffle_tags")
_LONGEST = 1 << 10
"""Bytes of a file that holds one value."""


def read_local(folder: Folder) -> tuple[Entry, ...]:
    """Read the files about the images of this very folder, in the order of precedence."""
    written = _read_yaml(folder, "local")
    settings: dict[str, Any] = {}
    remarks: list[Remark] = []
    for key in _SETTINGS:
        file = f"{key}.txt"
        if name := folder.own(file):
            settings[key] = _value(folder.path / name, key)
            other = first_setting(written, key)
            if other is not None and other != settings[key]:
                remarks.append(Remark(name, f"it says {settings[key]} and local.yaml {other}, which is used"))
        if name := folder.own(file + ".txt"):
            remarks.append(Remark(name, f"it is not read; did you mean {file}?"))
    return (*written, Entry(source="folder", remarks=tuple(remarks), **settings))


def read_global(folder: Folder) -> tuple[Entry, ...]:
    """Read the files about the images in and below a folder, in the order of precedence."""
    return _read_yaml(folder, "global")


def _read_yaml(folder: Folder, stem: str) -> tuple[Entry, ...]:
    names = filter(None, (folder.own(stem + ending) for ending in (".yaml", ".yml")))
    return tuple(read_yaml(folder.path / name, f"{stem}.yaml") for name in names)


def _value(path: Path, key: str) -> Any:
    text = read_text(path, _LONGEST)
    if key == "shuffle_tags" and text.strip().lower() not in ("false", "no", "off", "0"):
        return True  # in EveryDream2 the file's presence is enough
    try:
        return read_setting(key, text)
    except ValueError as error:
        raise FileError(f"{path.name}: {error}") from error
