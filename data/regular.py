"""Reading files made by others: regular files only, of a bounded size."""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

LARGEST_CONFIG = 4 << 20
"""Bytes of a configuration; a larger file is something else."""

LARGEST_STATE = 256 << 20
"""Bytes of a manifest, a state or a list of hashes, which grow with the model or the data."""

_KINDS = (
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading in binary. A pipe would wait for its writer, a device may not end."""
    if kind := irregular(path):
        raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))
    return path.open("rb")


def irregular(path: Path) -> str | None:
    """Return "pipe", "socket" or "device", or None for a regular file or a folder."""
    mode = path.stat().st_mode
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)


def read_regular(path: Path, largest: int = LARGEST_CONFIG) -> bytes:
    """Return the content of a regular file of at most `largest` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > largest:
            reason = f"it is larger than {largest >> 20} MiB, which is too much for what it is"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read()


def load_json(path: Path, largest: int = LARGEST_CONFIG) -> Any:
    """Parse a JSON file; ValueError if it is not JSON, or nested too deep."""
    try:
        return json.loads(read_regular(path, largest))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
