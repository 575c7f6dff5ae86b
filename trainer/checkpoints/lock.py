"""One writer per folder: an advisory lock that the operating system frees when its process ends."""

from __future__ import annotations

import errno
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from data.atomic import WINDOWS
from trainer.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = "run.lock"
"""The locked file, which names its holder and is deleted when the lock is given back."""

_PLACE = 1 << 20
"""The locked byte, beyond the end of the text: Windows lets nobody read what is locked."""

_PATIENCE = 1.0
"""Seconds to wait for a process that holds the lock for a moment, as `is_free` does."""

_HELD: set[Path] = set()
"""Folders that this process has locked: POSIX locks count per process, and any close frees them."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes during the block, if its file system has locks."""
    file = _acquire_patiently(folder.resolve())
    try:
        yield
    finally:
        _release(folder.resolve(), file)


def is_free(folder: Path) -> bool:
    """Return whether this process may write to a folder: it has locked it, or could."""
    try:
        file = _acquire(folder.resolve())
    except OSError:
        return False
    _release(folder.resolve(), file)
    return True


def _acquire_patiently(folder: Path) -> IO[bytes] | None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return _acquire(folder)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{folder} is in use by {error.strerror}; wait until it has ended, or stop it, and start "
                    "again. Two processes that write to one folder would lose each other's files."
                ) from error
        except OSError as error:
            raise UserError(
                f"{folder}: nothing can be written there ({error.strerror}); check disk and permissions."
            ) from error
        time.sleep(_PATIENCE / 10)


def _acquire(folder: Path) -> IO[bytes] | None:
    """Lock a folder and return the open file, None if this process has locked it before.

    `strerror` of a BlockingIOError names the process that has locked it.
    """
    if folder in _HELD:
        return None
    path = folder / LOCK
    while True:
        file = path.open("a+b")
        try:
            _lock(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                file.seek(0)
                holder = file.read(200).decode("utf-8", "replace")
                file.close()
                raise BlockingIOError(errno.EAGAIN, holder or "another process") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its holder has released and deleted it in between
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        file.flush()
    except OSError:
        file.close()
        raise
    _HELD.add(folder)
    return file


def _release(folder: Path, file: IO[bytes] | None) -> None:
    if file is None:
        return
    _HELD.discard(folder)
    if WINDOWS:
        file.close()  # Windows cannot delete an open file, nor one that the next holder has opened
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
    file.close()


def _lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        file.seek(_PLACE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _PLACE)
