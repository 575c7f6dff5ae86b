"""Duplicate images: files with the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from data.record import Record

_MIDDLE = 1 << 12
"""Bytes in the middle that are compared before whole files, since headers are alike."""


def find_duplicates(records: Iterable[Record]) -> tuple[tuple[str, ...], ...]:
    """Return groups of names of images whose files have the same content.

    Only files with equal sizes are opened; an unreadable image is in no group.
    """
    groups: list[list[Record]] = [list(records)]
    for key in (_size, _hash_middle, _hash_all):
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
    return os.stat(f"{record.folder}{os.sep}{record.file}").st_size  # noqa: PTH116  # Path is slow


def _hash_middle(record: Record) -> bytes:
    with record.path.open("rb") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        return hashlib.blake2b(file.read(_MIDDLE), digest_size=16).digest()


def _hash_all(record: Record) -> bytes:
    with record.path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
