"""State on disk: nested values and tensors as one .safetensors file and one JSON tree, never a pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from data.regular import LARGEST_STATE, load_json

T = TypeVar("T")

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of formats in a .safetensors header."""

_TENSOR = "$tensor"
_TUPLE = "$tuple"
_ITEMS = "$items"
_FLOAT = "$float"


def write_state(state: Any, path: Path) -> None:
    """Write tensors to `path`.safetensors, bit for bit, and everything else to `path`.json.

    Tensors are streamed to the file one after the other, so no second copy of the state exists in memory.
    Tensors that share their memory (the quantisation maps of 8-bit optimizers) are written once.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    tree = _to_tree(state, "state", tensors, seen)
    path.with_suffix(".json").write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    write_safetensors(path.with_suffix(".safetensors"), tensors, None, dtypes)


def read_state(path: Path) -> Any:
    """Return what `write_state` wrote, tensors on the CPU in their saved dtype."""
    tree = load_json(path.with_suffix(".json"), LARGEST_STATE)
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
        return _from_tree(tree, file)


def read_entry(path: Path, *place: str | int) -> Any:
    """Return one entry of what `write_state` wrote, by the keys that lead to it; the rest is not read."""
    tree = load_json(path.with_suffix(".json"), LARGEST_STATE)
    for key in place:
        tree = dict(tree[_ITEMS])[key] if isinstance(tree, dict) and _ITEMS in tree else tree[key]
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
        return _from_tree(tree, file)


def as_kind(kind: type[T], value: Any) -> T:
    """Return saved state as the type that it was saved from: a dataclass or builtin containers.

    Raises:
        ValueError: it is nothing of the kind.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error


def size_of_state(state: Any) -> int:
    """Return the bytes that the tensors of `state` will take in the file."""
    tensors: dict[str, Tensor] = {}
    _to_tree(state, "state", tensors, {})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    dtypes: Mapping[str, torch.dtype],
    *,
    align: int = 8,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors as a .safetensors file in the order of `dtypes`, converting and holding one at a time.

    Tensors may be on the meta device if `read` returns the values, called once for each name. The header has
    a multiple of `align` bytes.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype in dtypes.items():
        start, end = end, end + tensors[name].numel() * dtype.itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype in dtypes.items():
            tensor = (read or tensors.__getitem__)(name).detach().to(device="cpu", dtype=dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _to_tree(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
        if value.numel() == 0 or key not in seen:
            seen[key] = name
            tensors[name] = value
        return {_TENSOR: seen[key]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _to_tree(item, f"{name}.{key}", tensors, seen) for key, item in value.items()}
        return {
            _ITEMS: [[key, _to_tree(item, f"{name}.{key}", tensors, seen)] for key, item in value.items()]
        }
    if isinstance(value, tuple):
        return {
            _TUPLE: [_to_tree(item, f"{name}.{number}", tensors, seen) for number, item in enumerate(value)]
        }
    if isinstance(value, list):
        return [_to_tree(item, f"{name}.{number}", tensors, seen) for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved as state")


def _from_tree(tree: Any, file: Any) -> Any:
    if isinstance(tree, list):
        return [_from_tree(item, file) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return file.get_tensor(tree[_TENSOR]).clone()  # out of the mapped file, into aligned memory
    if _TUPLE in tree:
        return tuple(_from_tree(item, file) for item in tree[_TUPLE])
    if _FLOAT in tree:
        return float(tree[_FLOAT])
    if _ITEMS in tree:
        return {key: _from_tree(item, file) for key, item in tree[_ITEMS]}
    return {key: _from_tree(item, file) for key, item in tree.items()}
