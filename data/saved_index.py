"""The saved index of a large data set, which takes seconds to validate; 100 000 images take a minute to scan.

A saved index is valid while nothing has changed: no file of the roots (by size and times), no option that
enters it, and no code of this package. So no caption convention has to be known here.
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

from data.atomic import appearing
from data.folder import walk
from data.index import Index, build_index
from data.options import DataOptions
from data.regular import read_regular

FEWEST = 2000
"""Images of an index worth saving: fewer are scanned in a second."""

_LARGEST = 4 << 30
"""Bytes of a saved index: that of ten million images."""

_CLOCK_GRAIN = 2_000_000_000
"""Nanoseconds within which a file system may give a changed file the same times."""

_UNUSED_OPTIONS = (
    "resolution",
    "batch_size",
    "flip_p",
    "crop_jitter",
    "cond_dropout",
    "shuffle_tags",
    "keep_tags",
    "tag_dropout",
    "max_tokens",
    "on_bad_image",
    "num_workers",
)
"""Options without effect on a scan. A new option counts until it is named here."""


def remembered_index(options: DataOptions, folder: Path) -> Index:
    """Return `build_index`'s result, saved in `folder` by an earlier call if nothing has changed since.

    Lists of images are always scanned. A damaged file is as good as none, and failing to write is no error.
    """
    named = [options.data_root] if isinstance(options.data_root, str) else options.data_root
    roots = [Path(root) for root in named]
    if not roots or not all(root.is_dir() for root in roots):
        return build_index(options)
    key = "\n".join(str(root.resolve()) for root in roots)
    path = folder / f"index-{_hash(key.encode(errors='surrogateescape'))[:16]}.saved"
    signature, youngest = _signature(options, roots)
    index = _load(path, signature)
    if index is None:
        started = time.time_ns()
        index = build_index(options)
        transient = any("cannot be read" in file.reason for file in index.bad)
        if len(index.records) >= FEWEST and not transient and started - youngest > _CLOCK_GRAIN:
            _save(path, signature, index)
    return index


def _signature(options: DataOptions, roots: list[Path]) -> tuple[str, int]:
    """Return a hash of all that the index depends on, and the latest change of a file in nanoseconds."""
    digest = hashlib.blake2b(digest_size=16)
    names = [field.name for field in fields(options) if field.name not in _UNUSED_OPTIONS]
    settings = [(name, getattr(options, name)) for name in names]
    digest.update(repr((settings, _code())).encode())
    youngest = 0
    for root in roots:
        for folder in walk(root):
            digest.update(f"{folder.path}\0{folder.problem}".encode(errors="surrogateescape"))
            start = str(folder.path) + os.sep
            for name in (*folder.files, *folder.others):
                try:
                    status = os.stat(start + name)  # noqa: PTH116  # Path takes longer than the rest
                    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                    youngest = max(youngest, status.st_mtime_ns, status.st_ctime_ns)
                except OSError as error:
                    stamp = (error.errno,)
                digest.update(f"{name}\0{stamp}\0".encode(errors="surrogateescape"))
    return digest.hexdigest(), youngest


def _code() -> tuple[str, str, list[bool]]:
    """Return a fingerprint of the code that makes an index."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    optional = [importlib.util.find_spec(name) is not None for name in ("pillow_heif", "pyarrow")]
    return digest.hexdigest(), PIL.__version__, optional


def _save(path: Path, signature: str, index: Index) -> None:
    written = io.BytesIO()
    _Pickler(written, protocol=5).dump(index)
    content = written.getvalue()
    header = {"signature": signature, "content": _hash(content)}
    with suppress(OSError), appearing(path, shared=True) as draft:
        draft.write_bytes(json.dumps(header).encode() + b"\n" + content)


def _load(path: Path, signature: str) -> Index | None:
    try:
        header, _, content = read_regular(path, _LARGEST).partition(b"\n")
        if json.loads(header) != {"signature": signature, "content": _hash(content)}:
            return None
    except (OSError, ValueError):
        return None
    collecting = gc.isenabled()
    gc.disable()  # collections would take most of the time, and a million new objects hold no garbage
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        gc.freeze()  # later collections need not look at them either
    except pickle.UnpicklingError:  # a crafted file
        return None
    finally:
        if collecting:
            gc.enable()
    return found if isinstance(found, Index) else None


class _Pickler(pickle.Pickler):
    """Write dataclasses with slots as their values, which load four times as fast as pickle's own form."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if is_dataclass(kind) and "__slots__" in vars(kind):
            return _rebuild, (kind, tuple(getattr(obj, field.name) for field in fields(kind)))
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Build this package's dataclasses and paths only: a file from somebody else must not run code."""

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
    for put, value in zip(_setters(kind), values, strict=True):
        put(built, value)
    return built


@cache
def _setters(kind: Any) -> tuple[Callable[[Any, Any], None], ...]:
    """Return the setter of each slot, which works on frozen dataclasses too."""
    return tuple(getattr(kind, field.name).__set__ for field in fields(kind))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
