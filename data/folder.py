"""Folders of files, listed once: which images they hold and which files lie beside an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDER_FILES = (
    "batch_id.txt",
    "cond_dropout.txt",
    "flip_p.txt",
    "global.yaml",
    "global.yml",
    "local.yaml",
    "local.yml",
    "loss_scale.txt",
    "multiply.txt",
    "shuffle_tags.txt",
)
"""Names, in any case, of files that speak of a whole folder and so never of an image of that name."""


@dataclass(frozen=True)
class Folder:
    """What one folder holds, dot files left out.

    Listing a folder once and looking names up here spares a system call per image and kind of caption file.
    """

    path: Path
    files: tuple[str, ...]
    """Names of ordinary files, or of links to them, in the order of names."""
    folders: tuple[str, ...] = ()
    """Names of the folders inside, likewise."""
    others: tuple[str, ...] = ()
    """Names of what is neither file nor folder: broken links, pipes, devices."""
    problem: str = ""
    """Why the folder could not be listed; empty where it could."""

    def beside(self, stem: str, suffix: str) -> str | None:
        """Return the name of the file that has an image's stem and this extension in any case, or None."""
        return self._by_ending.get(suffix, {}).get(stem)

    def own(self, name: str) -> str | None:
        """Return the name, as it is spelled, of the file of one of the `FOLDER_FILES` or another name in lower case, or None."""
        return self._by_name.get(name)

    @cached_property
    def _by_ending(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for name in self.files:
            stem, dot, ending = name.rpartition(".")
            if stem and name.lower() not in FOLDER_FILES:
                found.setdefault(dot + ending.lower(), {})[stem] = name
        return found

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {name.lower(): name for name in self.files}


def walk(root: Path) -> Iterator[Folder]:
    """Yield every folder below a root, the root included, in the order of names.

    Symbolic links are followed; a folder that was reached before, by whichever link, is not entered again, so
    that a loop of links ends and no picture counts twice. Folders whose name begins with a dot are skipped.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        path = waiting.pop()
        try:
            status = path.stat()
        except OSError as error:
            yield _unreadable(path, error)
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            folder = list_folder(path)
            waiting.extend(path / name for name in reversed(folder.folders))
            yield folder


def list_folder(path: Path) -> Folder:
    """Return what a folder holds."""
    try:
        with os.scandir(path) as entries:
            kinds = sorted((entry.name, _kind(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        return _unreadable(path, error)
    folders, files, others = (
        tuple(name for name, kind in kinds if kind == wanted) for wanted in ("folder", "file", "other")
    )
    return Folder(path, files, folders, others)


def _unreadable(path: Path, error: OSError) -> Folder:
    return Folder(path, (), problem=f"the folder cannot be read ({error.strerror})")


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link that leads back to itself
        return "other"
