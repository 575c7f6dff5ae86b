"""The index: every trainable image below the roots, with its size and words, found once before training."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.captions import Caption, find_caption
from data.errors import DataError, FileError
from data.folder import Folder, walk
from data.image import SUFFIXES, displayed_size

if TYPE_CHECKING:
    from data.dataset import DataOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image to train on. Its place in `Index.records` is its record id."""

    folder: Path
    """One object for all images of a folder: a path of its own for each of 100 000 images would take a third of the index's memory."""
    file: str
    """The file's name in the folder."""
    name: str
    """Relative path with forward slashes, unique in the index and printable: what messages call the image."""
    width: int
    """Pixels as looked at, EXIF orientation applied; so is height."""
    height: int
    caption: Caption
    multiply: float = 1.0
    """How many times an epoch shows the image; a fraction is that share of the epochs, 0 leaves it out."""
    cond_dropout: float | None = None
    """This and the next three replace the run's option of the same name where they are not None."""
    flip_p: float | None = None
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    loss_scale: float = 1.0
    batch_id: str = ""
    """Images of one batch_id share their batches with each other only."""

    @property
    def path(self) -> Path:
        """Return where the image is."""
        return self.folder / self.file


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file that was left out, and why: `reason` ends the sentence that `name` begins."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Index:
    """What a scan found: the images in the natural order of their names, and the files that cannot be used."""

    records: tuple[Record, ...]
    bad: tuple[BadFile, ...]
    roots: tuple[Path, ...]

    def fingerprint(self) -> str:
        """Return a short hash of the images' names, sizes, captions and settings.

        It is the same for the same data on another machine, and changes with whatever changes the plan or the words.
        """
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            fields = [getattr(record, field) for field in Record.__dataclass_fields__ if field not in ("folder", "file")]
            digest.update(repr(fields).encode())
        return digest.hexdigest()


def build_index(options: DataOptions) -> Index:
    """Scan the data roots: list the images, read their headers and captions.

    Files with an image's extension that cannot be used are listed in `bad`. Pixels are not decoded, so that damage further
    inside a file shows only when it is trained on.

    Raises:
        DataError: a root is missing, is not a folder or lies inside another; or there is nothing to train on.
    """
    roots = _roots(options.data_root)
    records: list[Record] = []
    bad: list[BadFile] = []
    for root, prefix in zip(roots, _prefixes(roots), strict=True):
        for found in _scan(root, prefix):
            (records if isinstance(found, Record) else bad).append(found)  # type: ignore[arg-type]
    if not any(record.multiply > 0 for record in records):
        raise DataError(_nothing(roots, len(records), bad))
    records.sort(key=lambda record: (_natural(record.name), record.name))
    bad.sort(key=lambda file: (_natural(file.name), file.name))
    return Index(tuple(records), tuple(bad), roots)


def _scan(root: Path, prefix: str) -> Iterator[Record | BadFile]:
    for folder in walk(root):
        below = folder.path.relative_to(root).as_posix()
        start = prefix + ("" if below == "." else below + "/")
        if folder.problem:
            yield BadFile(_printable(start or "."), folder.problem)
        for name in filter(_is_image, folder.others):
            yield BadFile(_printable(start + name), "it is a broken link or not an ordinary file")
        for name in filter(_is_image, folder.files):
            yield _record(folder, name, _printable(start + name))


def _record(folder: Folder, file: str, name: str) -> Record | BadFile:
    path = folder.path / file
    try:
        width, height = displayed_size(path)
        return Record(folder=folder.path, file=file, name=name, width=width, height=height, caption=find_caption(path, folder))
    except FileError as error:
        return BadFile(name, error.reason)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES


def _printable(name: str) -> str:
    """Return a name that can be shown on one line anywhere: what cannot be printed becomes the replacement character."""
    return name if name.isprintable() else "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


def _natural(name: str) -> tuple[str | int, ...]:
    """Sort key in which image 2 comes before image 10."""
    return tuple(int(part) if place % 2 else part.casefold() for place, part in enumerate(re.split("([0-9]+)", name)))


def _roots(data_root: str | Sequence[str]) -> tuple[Path, ...]:
    roots = tuple(Path(root) for root in ([data_root] if isinstance(data_root, str) else data_root))
    problems = [problem for root in roots if (problem := _problem(root))]
    if not roots:
        problems = ["data_root: the list is empty; name at least one folder of captioned images"]
    if not problems:
        resolved = [root.resolve() for root in roots]
        problems = [
            f"data_root: {inner} is {outer} or lies inside it, so that its images would be found twice; list only one of them"
            for place, inner in enumerate(roots)
            for other, outer in enumerate(roots)
            if place != other and resolved[place].is_relative_to(resolved[other]) and (resolved[place] != resolved[other] or place > other)
        ]
    if problems:
        raise DataError(problems)
    return roots


def _problem(root: Path) -> str | None:
    if root.is_dir():
        if root.resolve() == Path(__file__).resolve().parent:
            return f"data_root: {root} is this program's own package of that name; put the images in another folder, for instance input"
        return None
    if root.exists():
        return f"data_root: {root} is a file; name the folder that holds the captioned images"
    siblings = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    close = difflib.get_close_matches(root.name, siblings, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; create it and put captioned images there, or name another folder"
    return f"data_root: folder not found: {root}{hint}"


def _prefixes(roots: Sequence[Path]) -> list[str]:
    """Return what comes before names below each root: nothing for a single one, else the path below the common parent."""
    if len(roots) == 1:
        return [""]
    resolved = [root.resolve() for root in roots]
    try:
        common = os.path.commonpath(resolved)
    except ValueError:  # on different drives
        return [root.as_posix() + "/" for root in resolved]
    return [root.relative_to(common).as_posix() + "/" for root in resolved]


def _nothing(roots: Sequence[Path], excluded: int, bad: Sequence[BadFile]) -> list[str]:
    searched = ", ".join(str(root) for root in roots)
    if excluded:
        return [f"data_root: {searched}: all {excluded} images are left out by multiply 0; raise it for some"]
    if bad:
        problems = [f"data_root: {searched}: none of the {len(bad)} files with an image's extension can be used"]
        return problems + [str(file) for file in bad[:10]] + ([f"... and {len(bad) - 10} more"] if len(bad) > 10 else [])
    return [f"data_root: no images in {searched} or its sub-folders; accepted are files ending in {', '.join(SUFFIXES)}"]
