"""A CLIP tokenizer with its own small byte-pair vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from .drawing import COLOURS, FACE, SHAPES

MERGES = 265
"""Learned merges; with 2 x 256 byte pieces and two special tokens the vocabulary has 779 entries."""

_WORD_END = "</w>"

_EVERYDAY_WORDS = """
pink brown grey cyan big tiny bright dark round left right top bottom two three happy sad eyes man woman
person portrait painting drawing style color colour light water mountain sky sun moon night day black hair
dress standing sitting beautiful city street forest garden river beach snow winter summer animal bird fish
horse car train table chair window door wooden old new young girl boy child head hand body front behind inside
under over near between glass metal stone paper
""".strip()


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the vocabulary and write the tokenizer with `vocab.json` and `merges.txt` into `folder`."""
    merges = learn_merges(dict(vocabulary_words()), MERGES)
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(c + _WORD_END for c in alphabet), *(a + b for a, b in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    options: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "model_max_length": 77}
    tokenizer = CLIPTokenizer(**options)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def vocabulary_words() -> Iterator[tuple[str, int]]:
    """Yield the words that the tokenizer learns from, with their weights."""
    for word in (
        *COLOURS,
        *SHAPES,
        "small",
        "large",
        "background",
        "on",
        "a",
        "an",
        "and",
        "with",
        "of",
        "picture",
    ):
        yield word, 100
    for word in (
        *FACE.split(),
        "star",
        "stripes",
        "dots",
        "photo",
        "the",
        "in",
        "flower",
        "house",
        "tree",
        "cat",
        "dog",
    ):
        yield word, 40
    for word in _EVERYDAY_WORDS.split():
        yield word, 10


def learn_merges(words: dict[str, int], count: int) -> list[tuple[str, str]]:
    """Return up to `count` byte-pair merges for weighted ASCII words, most frequent first, ties alphabetical.

    Source: Sennrich et al. 2016, algorithm 1.
    """
    split = {word: [*word[:-1], word[-1] + _WORD_END] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            raise ValueError(f"the words give only {len(merges)} merges, {count} are wanted")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merge(pieces, best) for word, pieces in split.items()}
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
