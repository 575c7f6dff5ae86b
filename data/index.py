"""The index: every trainable image below the roots, with its size and words, found once before training."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data.captions import sidecar_chain
from data.errors import DataError
from data.image import SUFFIXES
from data.options import DataOptions
from data.record import BadFile, Notice, Record
from data.scan import Scan
from data.table import SUFFIXES as LISTS


@dataclass(frozen=True)
class Index:
    """What a scan found: the images in the natural order of their names, and the files that cannot be used."""

    records: tuple[Record, ...]
    bad: tuple[BadFile, ...]
    roots: tuple[Path, ...]
    notices: tuple[Notice, ...] = ()
    """What the owner of files that are used should know."""

    def fingerprint(self) -> str:
        """Return a short hash of the images' names, sizes, captions and settings.

        It is the same for the same data on another machine, and changes with whatever changes the plan or the
        words. Fields at their defaults do not enter it, so that a later version's further fields leave it as
        it is.
        """
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            words = [_set_fields(version, "source", "others") for version in record.caption.versions]
            digest.update(repr((_set_fields(record, "folder", "file", "caption"), words)).encode())
        return digest.hexdigest()


def build_index(options: DataOptions) -> Index:
    """Scan the data roots: list the images, read their headers, captions and settings.

    Files with an image's extension that cannot be used are listed in `bad`, and so are files of words and
    settings that cannot be used, whose images are left out. Pixels are not decoded, so that damage further
    inside a file shows only when it is trained on.

    Raises:
        DataError: a root is missing, is neither a folder nor a list, or lies inside another; or one of them
            holds no image that can be used, or none is to be shown.
    """
    roots = _roots(options.data_root)
    scan = Scan(sidecar_chain(lines=options.caption_lines), caption_prefix=options.caption_prefix)
    problems: list[str] = []
    for root, start in zip(roots, _prefixes(roots), strict=True):
        images, bad = len(scan.records), len(scan.bad)
        (scan.folders if root.is_dir() else scan.table)(root, start)
        if len(scan.records) == images:
            problems += _nothing(root, scan.bad[bad:])
    if scan.records and not any(record.multiply > 0 for record in scan.records):
        problems.append(
            f"data_root: all {len(scan.records)} images are left out by multiply 0; raise it for some"
        )
    if problems:
        raise DataError(problems)
    records = sorted(scan.records, key=lambda record: (_natural(record.name), record.name))
    unusable = sorted(scan.bad, key=lambda file: (_natural(file.name), file.name))
    return Index(tuple(records), tuple(unusable), roots, scan.notices())


def refuse_bad(index: Index) -> None:
    """Refuse data with files that cannot be used, for a run that is to leave none out.

    Raises:
        DataError: there are some; all are named.
    """
    if index.bad:
        files = f"{len(index.bad)} files" if len(index.bad) > 1 else "a file"
        listed = [str(file) for file in index.bad]
        what_to_do = 'on_bad_image is "error"; mend or remove them, or set it to "skip"'
        raise DataError([f"data_root: {files} cannot be used, and {what_to_do}", *listed])


def _set_fields(thing: Any, *without: str) -> list[tuple[str, Any]]:
    values = {
        field.name: (getattr(thing, field.name), field.default)
        for field in fields(thing)
        if field.name not in without
    }
    return [(name, value) for name, (value, default) in values.items() if value != default]


def _natural(name: str) -> tuple[str | tuple[int, str], ...]:
    """Sort key in which image 2 comes before image 10."""
    parts = enumerate(re.split("([0-9]+)", name))
    # By the number of digits first: Python reads no number of thousands of them.
    return tuple(
        (len(part.lstrip("0")), part.lstrip("0")) if place % 2 else part.casefold() for place, part in parts
    )


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
            if place != other
            and resolved[place].is_relative_to(resolved[other])
            and (resolved[place] != resolved[other] or place > other)
        ]
    if problems:
        raise DataError(problems)
    return roots


def _problem(root: Path) -> str | None:
    if root.is_dir():
        if root.resolve() == Path(__file__).resolve().parent:
            return f"data_root: {root} is this program's own package of that name; put the images in another folder, for instance input"
        return None
    if root.is_file() and root.suffix.lower() in LISTS:
        return None
    if root.exists():
        return f"data_root: {root} is neither a folder of captioned images nor a list of them ({', '.join(LISTS)})"
    siblings = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    close = difflib.get_close_matches(root.name, siblings, n=1)
    hint = (
        f"; did you mean {close[0]!r}?"
        if close
        else "; create it and put captioned images there, or name another folder"
    )
    return f"data_root: folder not found: {root}{hint}"


def _prefixes(roots: Sequence[Path]) -> list[str]:
    """Return what comes before names below each root: nothing for a single one, else the path below the common parent."""
    if len(roots) == 1:
        return [""]
    resolved = [root.resolve() if root.is_dir() else root.resolve().parent for root in roots]
    try:
        common = os.path.commonpath(resolved)
    except ValueError:  # on different drives
        return [root.as_posix() + "/" for root in resolved]
    return ["" if root == Path(common) else root.relative_to(common).as_posix() + "/" for root in resolved]


def _nothing(root: Path, bad: Sequence[BadFile]) -> list[str]:
    if bad:
        problems = [f"data_root: {root}: none of its images can be used"]
        return (
            problems
            + [str(file) for file in bad[:10]]
            + ([f"... and {len(bad) - 10} more"] if len(bad) > 10 else [])
        )
    if root.is_file():
        return [f"data_root: {root} lists no images"]
    return [
        f"data_root: no images in {root} or its sub-folders; accepted are files ending in {', '.join(SUFFIXES)}"
    ]
