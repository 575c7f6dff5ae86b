"""Folders of files, listed once: their images, and the files beside an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.image import is_image

MASKS = "masks"
"""Name, in any case, of the folder of masks; without the s, also the ending of a mask's stem."""

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
"""Names, in any case, of files about a whole folder, which never belong to an image of that name."""

_UNREAD = (
    "arw", "cr2", "cr3", "dng", "exr", "ico", "j2k", "jp2", "jxl", "nef", "orf", "pbm", "pgm", "ppm", "psd",
    "raf", "raw", "rw2", "svg", "tga", "xcf",
)  # fmt: skip
"""Extensions of images in formats that are not read."""


@dataclass(frozen=True)
class Folder:
    """The content of one folder, without dot files.

    Looking names up here saves a system call for each image and kind of caption file.
    """

    path: Path
    files: tuple[str, ...]
    """Sorted names of ordinary files, and of links to them."""
    folders: tuple[str, ...] = ()
    """Sorted names of subfolders."""
    others: tuple[str, ...] = ()
    """Names of anything else: broken links, pipes, devices."""
    problem: str = ""
    """The reason why the folder could not be listed, or nothing."""

    def beside(self, stem: str, suffix: str) -> str | None:
        """Return the name of the file with an image's stem and this extension in any case."""
        return self._by_ending.get(suffix, {}).get(stem)

    def own(self, name: str) -> str | None:
        """Return the spelling of a file name that is given in lower case, such as one of `FOLDER_FILES`."""
        return self._by_name.get(name)

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Names of image files, without masks."""
        return tuple(name for name in self.files if is_image(name) and not _is_mask(name))

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """Names of images in formats that are not read."""
        return tuple(name for name in self.files if name.rpartition(".")[2].lower() in _UNREAD)

    @cached_property
    def captions_alone(self) -> tuple[str, ...]:
        """Names of captions without an image, such as `cat.jpg.txt` or `Cat.txt` beside `cat.jpg`."""
        stems = {*map(stem_of, self.images), *map(stem_of, self.unread), *FOLDER_FILES}
        texts = self._by_ending.get(".txt", {}) | self._by_ending.get(".caption", {})
        return tuple(sorted(name for stem, name in texts.items() if stem not in stems))

    @cached_property
    def masks(self) -> dict[str, str]:
        """Relative paths of masks by the stem of their image: `cat.mask.png`, else `masks/cat.png`."""
        beside = {stem_of(stem_of(name)): name for name in self.files if is_image(name) and _is_mask(name)}
        folder = self.mask_folder
        names = list_folder(self.path / folder).images if folder else ()
        return {stem_of(name): f"{folder}/{name}" for name in names} | beside

    @cached_property
    def mask_folder(self) -> str | None:
        """Name of the folder of masks; one without a file for any image here is an ordinary folder."""
        name = next((name for name in self.folders if name.lower() == MASKS), None)
        below = {stem_of(file) for file in list_folder(self.path / name).images} if name else set()
        return name if any(stem_of(image) in below for image in self.images) else None

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


def stem_of(name: str) -> str:
    """Return a file's name without its extension."""
    return name.rpartition(".")[0] or name


def walk(root: Path) -> Iterator[Folder]:
    """Yield a root and every folder below it, in the order of names, without dot folders.

    Symbolic links are followed, but no folder is entered twice, so that loops end and no image counts twice.
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
    """List one folder."""
    try:
        with os.scandir(path) as entries:
            kinds = sorted((entry.name, _kind(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        return _unreadable(path, error)
    folders, files, others = (
        tuple(name for name, kind in kinds if kind == wanted) for wanted in ("folder", "file", "other")
    )
    return Folder(path, files, folders, others)


def _is_mask(name: str) -> bool:
    return stem_of(name).lower().endswith(f".{MASKS[:-1]}")


def _unreadable(path: Path, error: OSError) -> Folder:
    return Folder(path, (), problem=f"the folder cannot be read ({error.strerror})")


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"
