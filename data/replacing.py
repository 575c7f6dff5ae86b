"""Files that are whole or absent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DRAFT = ".draft-"
_STALE = 3600.0
"""Seconds after which a draft is taken for the remains of a process that was killed: none is written for so long."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`, which takes its place, flushed to the disk, when the block succeeds and vanishes otherwise.

    Several processes may write the same path at once: one of them wins. The folder is made if it is missing.

    Raises:
        OSError: the disk is full, the folder cannot be written to, ...
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f"{_DRAFT}{os.getpid()}-{path.name}"
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        _flush_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def clear_drafts(folder: Path) -> None:
    """Remove what processes that were killed have left half-written in a folder."""
    for draft in folder.glob(_DRAFT + "*"):
        try:
            if time.time() - draft.stat().st_mtime > _STALE:
                draft.unlink()
        except FileNotFoundError:  # another process was faster, or has finished it
            continue


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # no handle on a folder there; renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
