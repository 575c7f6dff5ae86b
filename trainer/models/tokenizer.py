"""The tokenizer: read from a model, written for new and old readers alike, or CLIP's own, which comes with this program.

A checkpoint in the original layout holds no tokenizer, and SD 1.x and 2.x all use the vocabulary of OpenAI's CLIP. It is shipped
here (`clip_vocabulary/`, MIT licence), so that a single file loads without the hub.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from trainer.contained import files_inside
from trainer.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 77
"""The length of CLIP's context, start and end token included."""

_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """Return the tokenizer of CLIP: 49 408 entries, start at 49406, end at 49407, 77 tokens; SD 1.x pads with the end, SD 2.x with "!"."""
    vocabulary, merges = _clip_vocabulary()
    arguments: dict[str, Any] = {"vocab": dict(vocabulary), "merges": list(merges)}
    return CLIPTokenizer(**arguments, pad_token=pad, model_max_length=TOKENS)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a tokenizer folder: `tokenizer.json`, or `vocab.json` and `merges.txt` as older tools write them.

    Raises:
        UserError: the files are missing or damaged, or a link leads outside the folder.
    """
    files_inside(folder)
    if not (folder / "tokenizer.json").is_file() and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise UserError(
            f"{folder}: the tokenizer is missing: neither tokenizer.json nor vocab.json with merges.txt is there; "
            "copy the tokenizer folder of the model's base, or download the model again."
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise UserError(f"{folder}: the tokenizer cannot be read ({_first_line(error)}); download the model again.") from error
    if tokenizer.model_max_length > 1_000_000:  # the library's stand-in for "not said"
        tokenizer.model_max_length = TOKENS
    return tokenizer


def write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer as this transformers does, plus the `vocab.json` and `merges.txt` that older ones need."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(tokenizer, folder)
    model = _model(tokenizer)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
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
        files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}
    return json.dumps(files, ensure_ascii=False, separators=(",", ":"))


def tokenizer_from_text(text: str) -> CLIPTokenizer:
    """Return the tokenizer that `tokenizer_to_text` described."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in json.loads(text).items():
            (Path(folder) / Path(name).name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return read_tokenizer(Path(folder))


@cache
def _clip_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Return entries and merges. Entries are numbered in CLIP's order: bytes, bytes at the end of a word, merges, start, end."""
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = tuple((left, right) for left, _, right in (line.partition(" ") for line in lines))
    # Bytes that print stand for themselves and come first; the others are numbered from 256 on, as in GPT-2.
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(byte) for byte in printing] + [chr(256 + n) for n in range(256 - len(printing))]
    pieces = [*characters, *(c + "</w>" for c in characters), *(left + right for left, right in merges), START, END]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save as transformers does, without what it remembers of where the tokenizer was loaded from."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path", "special_tokens_map_file"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
