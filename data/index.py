"""The index: every trainable image of the data roots with its size and captions, found before training."""

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
    """The result of a scan: images in the natural order of their names, and unusable files."""

    records: tuple[Record, ...]
    bad: tuple[BadFile, ...]
    roots: tuple[Path, ...]
    notices: tuple[Notice, ...] = ()

    @property
    def masked(self) -> bool:
        """True if an image has a mask: then all are read with a fourth channel."""
        return any(record.mask for record in self.records)

    def fingerprint(self) -> str:
        """Hash the images' names, sizes, captions and settings.

        The hash is the same on another machine, and changes with whatever changes the plan or the captions.
        Fields at their defaults are not part of it, so that a later version's new fields leave it unchanged.
        """
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            captions = [_set_fields(version, "source", "others") for version in record.caption.versions]
            digest.update(repr((_set_fields(record, "folder", "file", "caption"), captions)).encode())
        return digest.hexdigest()


def build_index(options: DataOptions) -> Index:
    """Scan the data roots: list the images, read their headers, captions and settings.

    Unusable images are listed in `bad`, and so are unusable files of captions and settings, whose images are
    skipped. Pixels are not decoded, so damage further inside a file shows only when it is trained on.

    Raises:
        DataError: a root is missing, is neither a folder nor a list, or lies inside another; or it holds no
            usable image, or all are excluded.
    """
    roots = _roots(options.data_root)
    scan = Scan(
        sidecar_chain(lines=options.caption_lines),
        caption_prefix=options.caption_prefix,
        alpha_mask=options.alpha_mask,
        wildcards=options.wildcards,
    )
    problems: list[str] = []
    for root, start in zip(roots, _prefixes(roots), strict=True):
        images, bad = len(scan.records), len(scan.bad)
        (scan.folders if root.is_dir() else scan.table)(root, start)
        if len(scan.records) == images:
            problems += _no_images(root, scan.bad[bad:])
    if scan.records and not any(record.multiply > 0 for record in scan.records):
        problems.append(
            f"data_root: all {len(scan.records)} images are excluded by multiply 0; raise it for some"
        )
    if problems:
        raise DataError(problems)
    records = sorted(scan.records, key=lambda record: (_natural(record.name), record.name))
    unusable = sorted(scan.bad, key=lambda file: (_natural(file.name), file.name))
    return Index(tuple(records), tuple(unusable), roots, scan.notices())


def refuse_bad(index: Index) -> None:
    """Refuse data with unusable files, for on_bad_image "error", and name all."""
    if index.bad:
        files = f"{len(index.bad)} files" if len(index.bad) > 1 else "a file"
        fix = 'on_bad_image is "error"; mend or remove them, or set it to "skip"'
        raise DataError([f"data_root: {files} cannot be used, and {fix}", *map(str, index.bad)])


def _set_fields(thing: Any, *without: str) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that are not at their defaults."""
    return [
        (field.name, value)
        for field in fields(thing)
        if field.name not in without and (value := getattr(thing, field.name)) != field.default
    ]


def _natural(name: str) -> tuple[str | tuple[int, str], ...]:
    """Sort key in which image 2 comes before image 10."""
    parts = enumerate(re.split("([0-9]+)", name))
    # By the number of digits first, since Python refuses to parse thousands of digits.
    return tuple(
        (len(part.lstrip("0")), part.lstrip("0")) if number % 2 else part.casefold() for number, part in parts
    )


def _roots(data_root: str | Sequence[str]) -> tuple[Path, ...]:
    roots = tuple(Path(root) for root in ([data_root] if isinstance(data_root, str) else data_root))
    problems = [problem for root in roots if (problem := _problem(root))]
    if not roots:
        problems = ["data_root: the list is empty; name at least one folder of captioned images"]
    if not problems:
        resolved = [root.resolve() for root in roots]
        problems = [
            f"data_root: {inner} is {outer} or lies inside it, so that its images would be found twice; "
            "list only one of them"
            for i, inner in enumerate(roots)
            for j, outer in enumerate(roots)
            if i != j and resolved[i].is_relative_to(resolved[j]) and (resolved[i] != resolved[j] or i > j)
        ]
    if problems:
        raise DataError(problems)
    return roots


def _problem(root: Path) -> str | None:
    if root.is_dir():
        if root.resolve() == Path(__file__).resolve().parent:
            return (
                f"data_root: {root} is this program's own package of that name; put the images in another "
                "folder, for instance input"
            )
        return None
    if root.is_file() and root.suffix.lower() in LISTS:
        return None
    if root.exists():
        lists = ", ".join(LISTS)
        return f"data_root: {root} is neither a folder of captioned images nor a list of them ({lists})"
    siblings = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    close = difflib.get_close_matches(root.name, siblings, n=1)
    hint = "create it and put captioned images there, or name another folder"
    hint = f"did you mean {close[0]!r}?" if close else hint
    return f"data_root: folder not found: {root}; {hint}"


def _prefixes(roots: Sequence[Path]) -> list[str]:
    """Return each root's path below the common parent, to go before names; nothing for a single root."""
    if len(roots) == 1:
        return [""]
    resolved = [root.resolve() if root.is_dir() else root.resolve().parent for root in roots]
    try:
        common = os.path.commonpath(resolved)
    except ValueError:  # on different drives
        return [root.as_posix() + "/" for root in resolved]
    return ["" if root == Path(common) else root.relative_to(common).as_posix() + "/" for root in resolved]


def _no_images(root: Path, bad: Sequence[BadFile]) -> list[str]:
    if bad:
        more = [f"... and {len(bad) - 10} more"] if len(bad) > 10 else []
        return [f"data_root: {root}: none of its images can be used", *map(str, bad[:10]), *more]
    if root.is_file():
        return [f"data_root: {root} lists no images"]
    accepted = ", ".join(SUFFIXES)
    return [f"data_root: no images in {root} or its sub-folders; accepted are files ending in {accepted}"]
