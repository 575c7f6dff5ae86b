"""Folders of files, listed once: which images they hold and which files lie beside an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath


@dataclass(frozen=True)
class Folder:
    """What one folder holds, dot files left out.

    Listing a folder once and looking names up here spares a system call per image and kind of caption file.
    """

    path: Path
    files: tuple[str, ...]
    """Names of ordinary files, or of links to them, in the order of names."""
    others: tuple[str, ...] = ()
    """Names of what is neither file nor folder: broken links, pipes, devices."""
    problem: str = ""
    """Why the folder could not be listed; empty where it could."""

    def beside(self, image: Path, suffix: str) -> str | None:
        """Return the name of the file that shares the image's stem and has this extension in any case, or None."""
        return self._by_stem.get((image.stem, suffix))

    @cached_property
    def _by_stem(self) -> dict[tuple[str, str], str]:
        return {(path.stem, path.suffix.lower()): path.name for path in map(PurePath, self.files)}


def walk(root: Path) -> Iterator[Folder]:
    """Yield every folder below a root, the root included, in the order of names.

    Symbolic links are followed; a folder that was reached before, by whichever link, is not entered again, so that a loop of
    links ends and no picture counts twice. Folders whose name begins with a dot are skipped.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        path = waiting.pop()
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                kinds = sorted((entry.name, _kind(entry)) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            yield Folder(path, (), problem=f"the folder cannot be read ({error.strerror})")
            continue
        folders, files, others = (tuple(name for name, kind in kinds if kind == wanted) for wanted in ("folder", "file", "other"))
        waiting.extend(path / name for name in reversed(folders))
        yield Folder(path, files, others)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link that leads back to itself
        return "other"
