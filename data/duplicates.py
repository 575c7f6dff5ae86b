"""Images that are there more than once: files with the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from data.record import Record

_MIDDLE = 1 << 12
"""Bytes in the middle that are compared first, for beginnings are alike; only files that agree in them are read whole."""

_PIECE = 1 << 20


def find_duplicates(records: Iterable[Record]) -> tuple[tuple[str, ...], ...]:
    """Return the names of images whose files have the same content, those that belong together in a group.

    Only files of one size are opened. An image that cannot be read is like no other.
    """
    groups: list[list[Record]] = [list(records)]
    for key in (_size, _digest(_MIDDLE), _digest(None)):
        groups = [same for group in groups for same in _split(group, key)]
    return tuple(tuple(record.name for record in group) for group in groups)


def _split(records: Sequence[Record], key: Callable[[Record], Hashable]) -> list[list[Record]]:
    """Return the groups of two and more that agree in a key."""
    found: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        try:
            found[key(record)].append(record)
        except OSError:
            continue
    return [group for group in found.values() if len(group) > 1]


def _size(record: Record) -> int:
    return os.stat(f"{record.folder}{os.sep}{record.file}").st_size  # noqa: PTH116  # a path object would take most of the time


def _digest(length: int | None) -> Callable[[Record], bytes]:
    """Return what hashes so many bytes from the middle of a record's file on, or all of them."""

    def digest(record: Record) -> bytes:
        content = hashlib.blake2b(digest_size=16)
        with record.path.open("rb") as file:
            if length is not None:
                file.seek(file.seek(0, os.SEEK_END) // 2)
                content.update(file.read(length))
            else:
                while piece := file.read(_PIECE):
                    content.update(piece)
        return content.digest()

    return digest
