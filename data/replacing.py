"""Atomic writes, on Windows too, where other programs hold files open."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WINDOWS = os.name == "nt"

_DRAFT = ".draft-"
_STALE = 3600.0
"""Seconds after which a draft must be the remains of a killed process."""

_PATIENCE = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between attempts on Windows, where virus scanners and indexers briefly hold new files open."""

_NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of file systems that cannot flush a folder, such as mounted cloud drives."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden draft beside `path` that is flushed and replaces it if the block succeeds.

    If several processes write the same path at once, one of them wins. A missing folder is made.

    Raises:
        OSError: the disk is full, the folder cannot be written to, ...
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f"{_DRAFT}{os.getpid()}-{path.name}"
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        patiently(lambda: draft.replace(path))
        flush_folder(path.parent)
    finally:
        patiently(lambda: draft.unlink(missing_ok=True))


def clear_drafts(folder: Path) -> None:
    """Delete the drafts of killed processes."""
    for draft in folder.glob(_DRAFT + "*"):
        try:
            if time.time() - draft.stat().st_mtime > _STALE:
                draft.unlink()
        except FileNotFoundError:  # another process was faster, or has finished it
            continue


def patiently(act: Callable[[], object]) -> None:
    """Rename or delete a file; on Windows retry for three seconds while other programs hold it open.

    Raises:
        OSError: it cannot be done.
    """
    for seconds in _PATIENCE if WINDOWS else ():
        try:
            act()
            return
        except PermissionError:
            time.sleep(seconds)
    act()


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system can."""
    if WINDOWS:  # no handle on folders; renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(handle)
