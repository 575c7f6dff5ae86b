"""Hashes of image files, remembered between runs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.atomic import appearing
from data.record import Record
from data.regular import LARGEST_STATE, load_json, open_regular

READERS = 4
"""Threads that hash files."""

_CLOCK_GRAIN = 2_000_000_000
"""Nanoseconds within which a file system may give a changed file the same times."""


def content_hash(path: Path) -> str:
    """Hash a file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def record_hash(record: Record, *, masked: bool) -> str:
    """Hash an image's file, and with `masked` its mask too."""
    return "-".join(map(content_hash, _files(record, masked)))


def content_hashes(
    records: Sequence[Record], memory: Path, *, masked: bool = False, save: bool = True
) -> dict[int, str]:
    """Return `record_hash` by record id, and skip images that cannot be read.

    Args:
        memory: hashes of earlier runs, used for files with the same size and times.
        save: update `memory`; failing to write it is no error.
    """
    known = _remembered(memory)

    def fingerprint(path: Path) -> list[Any] | None:
        try:
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            before = known.get(str(path))
            return [*stamp, before[-1] if before and before[:-1] == stamp else content_hash(path)]
        except OSError:
            return None

    now = time.time_ns()
    with ThreadPoolExecutor(READERS) as pool:
        paths = list(dict.fromkeys(path for record in records for path in _files(record, masked)))
        fingerprints = dict(zip(paths, pool.map(fingerprint, paths), strict=True))
    facts = {
        str(path): fact for path, fact in fingerprints.items() if fact and now - max(fact[1:3]) > _CLOCK_GRAIN
    }
    if save and facts != known:
        with suppress(OSError), appearing(memory, shared=True) as draft:
            draft.write_text(json.dumps(facts), encoding="utf-8")
    hashes = {path: fact[-1] for path, fact in fingerprints.items() if fact}
    return {
        identity: "-".join(hashes[path] for path in files)
        for identity, files in enumerate(_files(record, masked) for record in records)
        if all(path in hashes for path in files)
    }


def _files(record: Record, masked: bool) -> tuple[Path, ...]:
    mask = record.mask_path if masked else None
    return (record.path,) if mask is None else (record.path, mask)


def _remembered(memory: Path) -> dict[str, list[Any]]:
    try:
        known = load_json(memory, LARGEST_STATE)
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        path: fact
        for path, fact in known.items()
        if isinstance(fact, list) and len(fact) == 4 and isinstance(fact[-1], str)
    }
