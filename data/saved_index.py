"""The index of a large data set, saved: scanning 100 000 images again takes a minute, looking whether anything changed a few seconds.

The whole index is kept, and holds only as long as nothing has changed: not one file below the roots (by size
and times), none of the options that enter it, and none of this package's code. So no convention has to be
known here.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import io
import json
import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path, PosixPath, WindowsPath
from typing import Any

import PIL

from data.folder import walk
from data.index import Index, build_index
from data.options import DataOptions
from data.regular import read_regular
from data.replacing import replacing

FEWEST = 2000
"""Images from which an index is worth saving: fewer are scanned in a second."""

_LARGEST = 4 << 30
"""Bytes of a saved index: that of ten million images."""

_GRAIN = 2_000_000_000
"""Nanoseconds within which a file could change once more and keep its times."""

_IDLE = (
    "resolution",
    "batch_size",
    "flip_p",
    "crop_jitter",
    "cond_dropout",
    "shuffle_tags",
    "keep_tags",
    "max_tokens",
    "on_bad_image",
    "num_workers",
)
"""Options that act when images are shown, not when they are scanned. A new option counts until it is named here."""


def remembered_index(options: DataOptions, folder: Path) -> Index:
    """Return what `build_index` returns, from an earlier call if nothing has changed since.

    Only folders are remembered, not lists of images.

    Args:
        options: as for `build_index`.
        folder: where indices are kept; one that is damaged or cannot be written is as good as none.

    Raises:
        DataError: as `build_index`.
    """
    roots = [
        Path(root)
        for root in ([options.data_root] if isinstance(options.data_root, str) else options.data_root)
    ]
    if not roots or not all(root.is_dir() for root in roots):
        return build_index(options)
    named = "\n".join(str(root.resolve()) for root in roots)
    path = folder / f"index-{_hash(named.encode(errors='surrogateescape'))[:16]}.saved"
    signature, youngest = _signature(options, roots)
    index = _load(path, signature)
    if index is None:
        began = time.time_ns()
        index = build_index(options)
        transient = any("cannot be read" in file.reason for file in index.bad)
        if len(index.records) >= FEWEST and not transient and began - youngest > _GRAIN:
            _save(path, signature, index)
    return index


def _signature(options: DataOptions, roots: list[Path]) -> tuple[str, int]:
    """Return a hash of all that the index depends on, and the time, in nanoseconds, of the last change of a file."""
    digest = hashlib.blake2b(digest_size=16)
    settings = [
        (field.name, getattr(options, field.name)) for field in fields(options) if field.name not in _IDLE
    ]
    digest.update(repr((settings, _code())).encode())
    youngest = 0
    for root in roots:
        for folder in walk(root):
            digest.update(f"{folder.path}\0{folder.problem}".encode(errors="surrogateescape"))
            start = str(folder.path) + os.sep
            for name in (*folder.files, *folder.others):
                try:
                    status = os.stat(start + name)  # noqa: PTH116  # a path object for each file would take longer than the rest
                    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                    youngest = max(youngest, status.st_mtime_ns, status.st_ctime_ns)
                except OSError as error:
                    stamp = (error.errno,)
                digest.update(f"{name}\0{stamp}\0".encode(errors="surrogateescape"))
    return digest.hexdigest(), youngest


def _code() -> tuple[str, str, list[bool]]:
    """Return what stands for the code that makes an index."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return (
        digest.hexdigest(),
        PIL.__version__,
        [importlib.util.find_spec(name) is not None for name in ("pillow_heif", "pyarrow")],
    )


def _save(path: Path, signature: str, index: Index) -> None:
    written = io.BytesIO()
    _Pickler(written, protocol=5).dump(index)
    content = written.getvalue()
    head = {"signature": signature, "content": _hash(content)}
    with suppress(OSError), replacing(path) as draft:
        draft.write_bytes(json.dumps(head).encode() + b"\n" + content)


def _load(path: Path, signature: str) -> Index | None:
    try:
        head, _, content = read_regular(path, _LARGEST).partition(b"\n")
        if json.loads(head) != {"signature": signature, "content": _hash(content)}:
            return None
    except (OSError, ValueError):
        return None
    collecting = gc.isenabled()
    gc.disable()  # a million new objects and no garbage: collections would take most of the time
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        gc.freeze()  # nor does any later collection have to look at them
    except pickle.UnpicklingError:  # a file that was made to run something
        return None
    finally:
        if collecting:
            gc.enable()
    return found if isinstance(found, Index) else None


class _Pickler(pickle.Pickler):
    """Writes dataclasses with slots as their values; pickle's own way for them takes four times as long to read."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if is_dataclass(kind) and "__slots__" in vars(kind):
            return _rebuild, (kind, tuple(getattr(obj, field.name) for field in fields(kind)))
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Builds dataclasses of this package and paths, and nothing else: a file that someone was given must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _rebuild.__name__):
            return _rebuild
        if module.partition(".")[0] == "data":
            found = super().find_class(module, name)
            if isinstance(found, type) and is_dataclass(found) and found.__module__ == module:
                return found
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return {"PosixPath": PosixPath, "WindowsPath": WindowsPath}[name]
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into an index")


def _rebuild(kind: Any, values: tuple[Any, ...]) -> Any:
    built = object.__new__(kind)
    for put, value in zip(_slots(kind), values, strict=True):
        put(built, value)
    return built


@cache
def _slots(kind: Any) -> tuple[Callable[[Any, Any], None], ...]:
    """Return what sets each field, frozen or not."""
    return tuple(getattr(kind, field.name).__set__ for field in fields(kind))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
