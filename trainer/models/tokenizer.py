"""The tokenizer: read from a model, written for new and old readers, or CLIP's own, bundled here.

A checkpoint in the original layout holds no tokenizer, and SD 1.x and 2.x all use the vocabulary of OpenAI's
CLIP. It is shipped here (`clip_vocabulary/`, MIT licence), so that a single file loads without the hub.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from data.regular import read_regular
from trainer.contained import files_inside
from trainer.errors import UserError, first_line

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 77
"""The length of CLIP's context, start and end token included."""

_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_LARGEST = 64 << 20
"""Bytes of one file; CLIP's have 4 MB at most."""
_NUMBERS = ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length")

_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """Return CLIP's tokenizer: 49,408 entries, 77 tokens; SD 2.x pads with "!"."""
    vocabulary, merges = _clip_vocabulary()
    arguments: dict[str, Any] = {"vocab": dict(vocabulary), "merges": list(merges)}
    return CLIPTokenizer(**arguments, pad_token=pad, model_max_length=TOKENS)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a tokenizer folder: `tokenizer.json`, or `vocab.json` and `merges.txt` of older tools."""
    there = {
        path.name: path for path in files_inside(folder) if path.parent == folder and path.name in _FILES
    }
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there.keys():
        raise UserError(
            f"{folder}: the tokenizer is missing: neither tokenizer.json nor vocab.json with merges.txt is "
            "there; copy the tokenizer folder of the model's base, or download the model again."
        )
    try:
        files = {name: read_regular(path, _LARGEST) for name, path in there.items()}
    except OSError as error:
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({error.strerror}); download the model again."
        ) from error
    return _from_files(files, f"{folder}: the tokenizer")


def write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer, with the `vocab.json` and `merges.txt` that older transformers need."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(tokenizer, folder)
    model = _model(tokenizer)
    (folder / "vocab.json").write_text(
        json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def is_clip_tokenizer(tokenizer: CLIPTokenizer, pad: str = END) -> bool:
    """Return whether the tokenizer is CLIP's own, entry for entry, and pads with `pad`."""
    vocabulary, merges = _clip_vocabulary()
    model = _model(tokenizer)
    return (
        len(tokenizer) == len(vocabulary)
        and tokenizer.model_max_length == TOKENS
        and tokenizer.pad_token == pad
        and model["vocab"] == vocabulary
        and [tuple(pair) for pair in model["merges"]] == list(merges)
    )


def tokenizer_to_text(tokenizer: CLIPTokenizer) -> str:
    """Return the tokenizer as compact JSON: its files by name."""
    with tempfile.TemporaryDirectory() as folder:
        _save(tokenizer, Path(folder))
        files = {
            path.name: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(Path(folder).glob("*.json"))
        }
    return json.dumps(files, ensure_ascii=False, separators=(",", ":"))


def tokenizer_from_text(text: str, where: str = "the tokenizer") -> CLIPTokenizer:
    """Return the tokenizer that `tokenizer_to_text` described; messages call it `where`."""
    try:
        files = {
            name: json.dumps(content).encode() for name, content in json.loads(text).items() if name in _FILES
        }
        if "tokenizer.json" not in files:
            raise ValueError("it holds no tokenizer.json")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} cannot be read ({first_line(error)}); export the file again.") from error
    return _from_files(files, where)


def _from_files(files: Mapping[str, bytes], where: str) -> CLIPTokenizer:
    """Return the tokenizer of files by name, copied to a folder of their own: settings could name others."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(
                    _plain(content) if name == "tokenizer_config.json" else content
                )
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.model_max_length > 1_000_000:  # the library's stand-in for "not said"
            tokenizer.model_max_length = TOKENS
        if (
            not all(type(getattr(tokenizer, name)) is int for name in _NUMBERS)
            or tokenizer.model_max_length < 3
        ):
            raise ValueError("it lacks a start, an end, a padding or a length")
        tokenizer("a photo of a cat")
    except BaseException as error:  # the tokenizers library raises plain Exception, and panics outside of it
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where} cannot be read ({first_line(error)}); download the model again.") from error
    return tokenizer


def _plain(content: bytes) -> bytes:
    """Return tokenizer settings without those that name files or code."""
    settings = json.loads(content)
    return json.dumps(
        {key: value for key, value in settings.items() if not key.endswith("_file") and key != "auto_map"}
    ).encode()


@cache
def _clip_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Return entries, in CLIP's order (bytes, bytes ending a word, merges, start, end), and merges."""
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = tuple((left, right) for left, _, right in (line.partition(" ") for line in lines))
    # Bytes that print stand for themselves and come first; the others are numbered from 256 on, as in GPT-2.
    printing = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = [chr(byte) for byte in printing] + [chr(256 + n) for n in range(256 - len(printing))]
    entries = [
        *characters,
        *(c + "</w>" for c in characters),
        *(left + right for left, right in merges),
        START,
        END,
    ]
    return {entry: number for number, entry in enumerate(entries)}, merges


def _save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save as transformers does, without the folder that the tokenizer was loaded from."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path", "special_tokens_map_file"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]
