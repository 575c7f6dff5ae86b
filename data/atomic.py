"""Files and folders that appear whole or not at all, on Windows too, and the disk space that they take."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WINDOWS = os.name == "nt"

DRAFT, REPLACED, DROPPED = ".draft-", ".replaced-", ".dropped-"
"""Prefixes of hidden names: of a file being written, being replaced, being deleted."""

_STALE = 3600.0
"""Seconds after which a draft in a shared folder must be the remains of a killed process."""

_PATIENCE = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between attempts on Windows, where virus scanners and indexers briefly hold new files open."""

_NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of file systems that cannot flush a folder, such as mounted cloud drives."""


@contextmanager
def appearing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a hidden draft beside `path` that is flushed and replaces it if the block succeeds.

    A folder cannot be renamed onto another: if `path` is one, it is renamed first and deleted last. A
    process killed in between leaves it under its hidden name, from which `restore` brings it back.

    `path` is as it was if the block or the replacement fails. If `shared`, several processes may write the
    file at once; one of them wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f"{DRAFT}{f'{os.getpid()}-' if shared else ''}{path.name}"
    old = path.parent / f"{REPLACED}{path.name}"
    try:
        remove(draft)
        yield draft
        _flush(draft)
        if path.is_dir():
            remove(old)
            _rename(path, old)
            try:
                _rename(draft, path)
            except OSError:
                _rename(old, path)
                raise
            with suppress(OSError):  # the new one is in its place; `restore` deletes the rest
                remove(old)
        else:
            _rename(draft, path)
        _flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # the first error says why; `tidy` deletes the rest
            remove(draft)
        raise


def restore(folder: Path) -> None:
    """Bring back entries of `folder` that a process was replacing when it was killed."""
    for old in folder.glob(f"{REPLACED}*"):
        path = folder / old.name.removeprefix(REPLACED)
        if path.exists():
            remove(old)
        else:
            _rename(old, path)


def tidy(folder: Path) -> None:
    """Delete what killed processes left half written or half deleted in a folder without other writers."""
    restore(folder)
    for start in (DRAFT, DROPPED):
        for path in folder.glob(f"{start}*"):
            remove(path)


def clear_drafts(folder: Path) -> None:
    """Delete the drafts of killed processes in a folder that other processes may be writing to."""
    for draft in folder.glob(f"{DRAFT}*"):
        with suppress(FileNotFoundError):  # another process was faster, or has finished it
            if time.time() - draft.stat().st_mtime > _STALE:
                draft.unlink()


def drop(path: Path, folder: Path | None = None) -> None:
    """Delete a file or folder, renamed to a hidden name in `folder` or in place first.

    If it cannot be renamed, it stays whole; if not all of it can be deleted, the rest stays hidden.
    """
    aside = (folder or path.parent) / f"{DROPPED}{path.name}"
    remove(aside)
    _rename(path, aside)
    remove(aside)


def remove(path: Path) -> None:
    """Delete a file or folder if there is one."""
    _patiently(lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True))


def nearest_folder(path: Path) -> Path:
    """Return the deepest folder on the way to `path` that exists."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def free_bytes(folder: Path) -> int:
    """Return the free disk space where `folder` is or would be."""
    return shutil.disk_usage(nearest_folder(folder)).free


def writing_speed(folder: Path, size: int = 1 << 26) -> float:
    """Return bytes per second of writing and flushing a file where `folder` is or would be."""
    path = nearest_folder(folder) / f"{DRAFT}speed-{os.getpid()}"
    block = os.urandom(1 << 20)  # nothing that a file system could compress
    try:
        began = time.perf_counter()
        with path.open("xb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def in_gib(size: float) -> str:
    """Return bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _rename(source: Path, target: Path) -> None:
    _patiently(lambda: source.replace(target))


def _patiently(act: Callable[[], object]) -> None:
    """Rename or delete; on Windows retry for three seconds while other programs hold the file open."""
    for seconds in _PATIENCE if WINDOWS else ():
        try:
            act()
            return
        except PermissionError:
            time.sleep(seconds)
    act()


def _flush(path: Path) -> None:
    entries = [path, *path.rglob("*")] if path.is_dir() else [path]
    for file in (entry for entry in entries if entry.is_file()):
        with file.open("rb+") as handle:  # Windows flushes only what is open for writing
            os.fsync(handle.fileno())
    for folder in (entry for entry in entries if entry.is_dir()):
        _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
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
