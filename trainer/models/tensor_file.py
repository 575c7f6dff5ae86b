"""Files of named tensors: .safetensors, one tensor at a time, and .ckpt, without running its pickle."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.regular import open_regular
from trainer.errors import UserError, first_line
from trainer.state_file import DTYPES, write_safetensors

_LONGEST_HEADER = 32 << 20
"""Bytes. Stable Diffusion's headers have 0.2 MB; parsed JSON takes some twenty times its size."""

_LINE = 64
"""Bytes of a cache line."""

_POINTER = "this is a Git LFS pointer, not the file itself; run `git lfs pull`, or download the file."


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors, .ckpt or .bin file by name, each read on access.

    Attributes:
        dtypes: None for one that this program does not write, such as those of 8 bits.
        metadata: the text fields of a .safetensors header.
        global_step: the training steps of a .ckpt; None if unknown.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its list of tensors, if it is whole and safe to read."""
        self.path = path
        self.metadata: dict[str, str] = {}
        self.global_step: int | None = None
        try:
            self._open(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{path}: the file cannot be read ({reason}); check disk and permissions, "
                "or download it again."
            ) from error

    def _open(self, path: Path) -> None:
        if path.suffix.lower() in (".ckpt", ".bin"):
            tensors, self.global_step = _read_ckpt(path)
            self._tensors: Any = tensors
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
            self.dtypes: dict[str, torch.dtype | None] = {
                name: tensor.dtype for name, tensor in self._tensors.items()
            }
        else:
            header = _read_header(path)
            self.metadata = header.pop("__metadata__")
            self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            kinds = {written: dtype for dtype, written in DTYPES.items()}
            self.dtypes = {name: kinds.get(entry["dtype"]) for name, entry in header.items()}
            try:
                self._tensors = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, ValueError) as error:  # ValueError: its header is not UTF-8
                raise UserError(
                    f"{path}: the file is damaged ({first_line(error)}); download or copy it again."
                ) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._tensors[name] if isinstance(self._tensors, dict) else self._tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text fields of a .safetensors header, without opening its tensors."""
    return _read_header(path)["__metadata__"]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a .safetensors file, converting and holding one tensor at a time.

    The file appears at once, so the caller writes to a draft and renames it.

    Args:
        tensors: on the meta device if `read` returns the values.
        dtype: of the floating-point tensors in the file; others keep theirs.
        read: returns a tensor by name, called once for each.
    """
    stored = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    # Readers compute on the mapped file, and matrix products are slower, and round differently, if a tensor
    # does not start at a cache line: so the data starts at one, tensors of whole lines come first, and the
    # rest by element size.
    lines = {name: tensors[name].numel() * stored[name].itemsize % _LINE == 0 for name in tensors}
    order = sorted(tensors, key=lambda name: (not lines[name], -stored[name].itemsize, name))
    dtypes = {name: stored[name] for name in order}
    write_safetensors(path, tensors, metadata, dtypes, align=_LINE, read=read)


def _read_header(path: Path) -> dict[str, Any]:
    """Return a .safetensors header with its metadata, checked against the file's size."""
    size = path.stat().st_size
    with open_regular(path) as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise UserError(f"{path}: {_POINTER}")
        if start.startswith((b"PK\x03\x04", b"\x80\x02")):
            raise UserError(
                f"{path}: this is a .ckpt file; give it that ending, and it is read without running what it "
                "holds."
            )
        if start.lstrip()[:1] == b"<":
            raise UserError(f"{path}: this is a web page, not a model; download the file itself.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if 2 <= length <= _LONGEST_HEADER and length > size - 8:
            raise UserError(f"{path}: the file is cut short after {size:,} bytes; download or copy it again.")
        text = file.read(length) if 2 <= length <= _LONGEST_HEADER else b""
    header, metadata = {}, {}
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        valid = all(map(_is_entry, header.values())) and all(
            isinstance(text, str) for text in metadata.values()
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(f"{path}: this is not a .safetensors file: it does not begin with a list of tensors.")
    promised = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if promised > size:
        raise UserError(
            f"{path}: the file is cut short: it holds {size:,} of {promised:,} bytes; "
            "download or copy it again."
        )
    if promised < size:
        raise UserError(
            f"{path}: the file is damaged: it holds {size:,} bytes instead of {promised:,}; "
            "download or copy it again."
        )
    return {**header, "__metadata__": metadata}


def _is_entry(entry: Any) -> bool:
    """Return whether a header's entry has the right parts; the library checks that they fit together."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int for number in (*shape, *offsets))


def _read_ckpt(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Return the tensors of a .ckpt and its `global_step`, if any; refuse a pickle that asks for code.

    Lightning, which wrote Stable Diffusion's first files, put its own classes and numpy's numbers beside the
    weights. Empty stand-ins take their names, so neither library is called nor needed.
    """
    stand_ins: list[Any] = [(_Nothing, name) for name in check_pickle(path)]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises UnpicklingError, EOFError, RuntimeError and others
        advice = "download or copy it again, or get the .safetensors version"
        damaged = (
            f"{path}: the {path.suffix} file cannot be read as plain tensors ({first_line(error)}); {advice}."
        )
        raise UserError(hostile(path, error) or damaged) from error
    content = content if isinstance(content, dict) else {}
    step = content.get("global_step")
    content = content.get("state_dict", content)
    named = content.items() if isinstance(content, dict) else ()
    tensors = {
        name: tensor
        for name, tensor in named
        if isinstance(name, str) and isinstance(tensor, Tensor) and _is_plain(tensor)
    }
    if not tensors:
        raise UserError(
            f"{path}: the {path.suffix} file holds no tensors; name a whole Stable Diffusion 1.x or 2.x "
            "checkpoint."
        )
    return tensors, step if isinstance(step, int) else None


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_complex()
    )


_BESIDE_WEIGHTS = ("pytorch_lightning.", "lightning.", "numpy.", "_codecs.encode")
"""Prefixes of names that Lightning's files hold beside the weights."""


class _Nothing:
    """A stand-in for an unwanted object; it keeps nothing of its arguments and state."""

    def __new__(cls, *_: Any) -> _Nothing:
        """Return an empty object."""
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Take a state."""


def check_pickle(path: Path) -> list[str]:
    """Return the harmless names that a .ckpt or .bin asks for beside those of plain tensors; run nothing.

    Raises:
        UserError: it is something else, cut short, or asks for what weights have no use for.
    """
    with open_regular(path) as file:
        start, packed = file.read(64), zipfile.is_zipfile(file)
        inflated = packed and _unpacked_size(file) > os.fstat(file.fileno()).st_size
    if problem := _no_pickle(path, start, packed=packed):
        raise UserError(f"{path}: {problem}")
    if inflated:  # torch stores without compression; a small file could fill the memory
        raise UserError(
            f"{path}: its contents are compressed, which torch never does; "
            "get this file from a source that you trust."
        )
    wanted = _foreign_names(path) if packed else []
    if strange := [name for name in wanted if not name.startswith(_BESIDE_WEIGHTS)]:
        raise UserError(_refusal(path, strange))
    return wanted


def _unpacked_size(file: BinaryIO) -> int:
    """Return the unpacked bytes of a zip file; 0 for a damaged one."""
    try:
        return sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
    except Exception:  # zipfile raises several kinds; reading the tensors says what is wrong
        return 0


def hostile(path: Path, error: Exception) -> str | None:
    """Return the globals a legacy (pre-2020) pickle asks for, after torch refused to load it, else None."""
    strange = re.findall(r"GLOBAL ([\w.]+)", str(error))
    return _refusal(path, strange) if strange else None


def _refusal(path: Path, strange: list[str]) -> str:
    return (
        f"{path}: the {path.suffix} file asks for {', '.join(strange[:3])}, which weights have no use for "
        "and an attack would; nothing of it was run. Get the .safetensors version of the model, or this file "
        "from a source that you trust."
    )


def _foreign_names(path: Path) -> list[str]:
    """Return the names that a .ckpt's pickle asks for beside those of plain tensors, without running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged: reading it says how
        return []


def _no_pickle(path: Path, start: bytes, *, packed: bool) -> str | None:
    """Return what a file is that cannot be a .ckpt, and what to do; None if it can be one."""
    size = path.stat().st_size
    if start.startswith(b"version "):
        return _POINTER
    if start[8:9] == b"{":
        return "this is a .safetensors file; give it that ending."
    if start.lstrip()[:1] == b"<":
        return "this is a web page, not a model; download the file itself."
    if start.startswith(b"PK") and not packed:  # the list of a zip's contents comes last
        return f"the file is cut short after {size:,} bytes; download or copy it again."
    if not start.startswith((b"PK", b"\x80")):
        return f"this is not a {path.suffix} file: it does not begin like one; download or copy it again."
    return None
