"""Files and folders that appear whole or not at all, and the room that they take."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.replacing import flush_folder, patiently

DRAFT, REPLACED, DROPPED = ".draft-", ".replaced-", ".dropped-"
"""How hidden names begin: what is being written, what is being replaced, and what is being deleted."""


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`, which takes its place, flushed to the disk, when the block succeeds, and vanishes when it fails.

    A folder cannot be renamed onto another: where `path` is one, it is renamed first and deleted last. A
    process killed in between leaves it under its hidden name, from which `restore` brings it back.

    Raises:
        OSError: what was written, or its place, cannot be; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (path.parent / f"{start}{path.name}" for start in (DRAFT, REPLACED))
    try:
        remove(draft)
        yield draft
        _flush(draft)
        if path.is_dir():
            remove(old)
            rename(path, old)
            try:
                rename(draft, path)
            except OSError:
                rename(old, path)
                raise
            with suppress(OSError):  # the new one is in its place; `restore` deletes what is left
                remove(old)
        else:
            rename(draft, path)
        flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # the first error says why; `tidy` deletes what is left
            remove(draft)
        raise


def restore(folder: Path) -> None:
    """Bring back what a process that was killed while it replaced an entry of `folder` has left under a hidden name."""
    for old in folder.glob(f"{REPLACED}*"):
        path = folder / old.name.removeprefix(REPLACED)
        if path.exists():
            remove(old)
        else:
            rename(old, path)


def tidy(folder: Path) -> None:
    """Delete what processes that were killed have left half written or half deleted in `folder`, which no other process writes to."""
    restore(folder)
    for start in (DRAFT, DROPPED):
        for path in folder.glob(f"{start}*"):
            remove(path)


def drop(path: Path, folder: Path | None = None) -> None:
    """Delete a file or folder so that it is gone at once: it is given a hidden name, in `folder` or where it is, first.

    Raises:
        OSError: it cannot be renamed, and is still whole; or not all of it can be deleted, and the rest is
        hidden.
    """
    aside = (folder or path.parent) / f"{DROPPED}{path.name}"
    remove(aside)
    rename(path, aside)
    remove(aside)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file; on Windows with patience for other programs that hold it open."""
    patiently(lambda: source.replace(target))


def remove(path: Path) -> None:
    """Delete a file or folder if there is one."""

    def delete() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    patiently(delete)


def nearest_folder(path: Path) -> Path:
    """Return the deepest folder on the way to `path` that exists."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def free_bytes(folder: Path) -> int:
    """Return the room on the file system where `folder` is or would be."""
    return shutil.disk_usage(nearest_folder(folder)).free


def writing_speed(folder: Path, size: int = 1 << 26) -> float:
    """Return bytes per second, measured by writing and flushing a file of `size` bytes where `folder` is or would be.

    Raises:
        OSError: nothing can be written there.
    """
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


def _flush(path: Path) -> None:
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    for file in files:
        with file.open("rb+") as handle:  # Windows flushes only what is open for writing
            os.fsync(handle.fileno())
    if path.is_dir():
        for folder in [path, *(found for found in path.rglob("*") if found.is_dir())]:
            flush_folder(folder)
