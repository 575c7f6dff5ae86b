"""Wildcards: of `{a|b}` in a caption or prompt one alternative is shown; `{{` and `}}` are braces."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")

Pick = Callable[[list[str]], str]
"""Choose one of the alternatives."""


def first(alternatives: list[str]) -> str:
    """Choose the first alternative: for measurements that must not vary."""
    return alternatives[0]


def longest(alternatives: list[str]) -> str:
    """Choose the longest alternative."""
    return max(alternatives, key=len)


def drawn(draws: np.random.Generator) -> Pick:
    """Return the choice by a generator, each alternative equally likely."""
    return lambda alternatives: alternatives[draws.integers(len(alternatives))]


def choose(text: str, pick: Pick) -> str:
    """Replace every wildcard of a text, which are not nested, and squeeze its white space."""

    def replacement(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else pick(match[1].split("|"))

    return " ".join(_PART.sub(replacement, text).split())


def has_wildcards(text: str) -> bool:
    """Return True if a text holds a wildcard or an escaped brace."""
    return _PART.search(text) is not None


def has_alternatives(text: str) -> bool:
    """Return True if a text holds a wildcard, escaped braces aside."""
    return any("|" in (match[1] or "") for match in _PART.finditer(text))


def has_stray_brace(text: str) -> bool:
    """Return True if a text holds a brace of no wildcard: one that is nested, unclosed or never opened."""
    return not {"{", "}"}.isdisjoint(outside(text))


def outside(text: str) -> str:
    """Return a text without its wildcards and escaped braces."""
    return _PART.sub("", text)
