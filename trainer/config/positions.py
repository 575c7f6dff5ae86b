"""Read JSON strictly, with the line of every key, and explain the first syntax error."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.report import Place, Report, Written

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a file to a value, for instance ("base", "betas", 1)."""

_DEEPEST = 40
_CURLY = "“”„‟"
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],]|[^\s{}\[\],:"]+')
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"?')
_QUOTED = re.compile(f"[{_CURLY}']([^{_CURLY}'\"\n]*)")
_WORD = re.compile(r"[^\s,:{}\[\]\"“”„‟]+")
_DRIVE = re.compile(r"[A-Za-z]:\\(?!\\)|\\\\[A-Za-z][\w.-]{2,}\\(?!u[0-9A-Fa-f]{4})[A-Za-z]\w{2,}")
_MEANT = {"none": "null", "null": "null"} | dict.fromkeys(("true", "yes", "on"), "true")
_MEANT |= dict.fromkeys(("false", "no", "off"), "false")
_TAIL = re.compile(r"[^\s,:{}\[\]\"]*\Z")
_COMMENT = (
    'comments are not JSON: remove it, or write it as text under a key that starts with _, such as "_note"'
)
_PLAIN = {
    "Expecting property": "where a key in double quotes must stand (a number takes a point, a list brackets)",
    "Expecting ':'": "where a : must follow the key",
    "Expecting ','": "where a comma or a } must stand",
    "Expecting value": "where a value must stand, or null for the default",
    "Extra data": "after the closing }: remove it, or move it before the brace",
}
"""The messages of the `json` module by their first words, for readers."""


@dataclass(frozen=True)
class Document:
    """A JSON file: its name in messages, its folder, its object, and the line of every key and list item."""

    file: str
    folder: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def place(self, *path: str | int) -> Place:
        """Return the place of a key or a list item."""
        return Place(self.file, self.lines.get(path), _spelled(path))

    def members(self, value: Any, *path: str | int) -> dict[str, Written]:
        """Return the entries of the object `value` at `path`, but documentation; {} if it is no object."""
        entries = value.items() if isinstance(value, Mapping) else ()
        return {
            name: Written(inner, self.place(*path, name), self.folder)
            for name, inner in entries
            if not is_documentation(name)
        }


class _SyntaxError(Exception):
    """The first syntax error: a sentence without a full stop, and its position (None: the whole text)."""

    def __init__(self, sentence: str, position: int | None = None) -> None:
        self.sentence, self.position = sentence, position
        super().__init__(sentence)


def is_documentation(name: str) -> bool:
    """Return whether a key is for readers only."""
    return name in ("$schema", "doc") or name.startswith("_")


def read_text(content: bytes, file: str, report: Report) -> str | None:
    """Return a file's bytes as text with Unix line ends; None after reporting that they are not UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        report.error(Place(file), "the file is saved as UTF-16; save it as UTF-8")
    elif b"\x00" in content:
        report.error(
            Place(file), "the file is not text (it holds zero bytes); name a file of text saved as UTF-8"
        )
    else:
        try:
            return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            place = Place(file, content.count(b"\n", 0, error.start) + 1)
            report.error(
                place, f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
            )
    return None


def read_json(content: bytes, file: str, report: Report, folder: Path | None = None) -> Document | None:
    """Return the object in a file; None after reporting the first syntax error with line and column.

    All keys that are written twice are reported. NaN and Infinity are read, as by `json.loads`.
    """
    text = read_text(content, file, report)
    if text is None:
        return None
    try:
        _check_start(text)
        values = json.loads(text, parse_int=lambda word: int(word) if len(word) <= 100 else float(word))
        lines, twice = _lines(text)
    except RecursionError:
        report.error(Place(file), f"brackets are nested more than {_DEEPEST} deep")
    except json.JSONDecodeError as error:
        report.error(*_at(file, text, *_explained(text, error)))
    except _SyntaxError as error:
        report.error(*_at(file, text, error.sentence, error.position))
    else:
        for path, first, second in twice:
            sentence = f"written twice, first in line {first}; keep one of the two"
            report.error(Place(file, second, _spelled(path)), sentence)
        return Document(file, folder, values, lines)
    return None


def _at(file: str, text: str, sentence: str, position: int | None) -> tuple[Place, str]:
    if position is None:
        return Place(file), sentence
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    return Place(file, line, column=column), sentence


def _check_start(text: str) -> None:
    start = text.lstrip()
    if not start:
        raise _SyntaxError("the file is empty; it must hold an object: { ... }")
    if not start.startswith(("{", "//", "/*", "#")):
        first = start.partition("\n")[0].strip()
        kind = {"[": "a list", '"': "text"}.get(start[0], f"'{_clip(first)}'")
        sentence = f"the file must hold an object in braces, {{ ... }}, but starts with {kind}"
        raise _SyntaxError(sentence, len(text) - len(start))


def _lines(text: str) -> tuple[dict[KeyPath, int], list[tuple[KeyPath, int, int]]]:
    """Return the line of each key and list item of valid JSON, and both lines of keys written twice."""
    lines: dict[KeyPath, int] = {}
    twice: list[tuple[KeyPath, int, int]] = []
    path: list[Any] = []  # of each open bracket the index, or the key: None before it
    line, end = 1, 0
    for token in _TOKEN.finditer(text):
        word = token[0]
        line, end = line + text.count("\n", end, token.start()), token.start()
        if word in "}]":
            path.pop()
        elif word == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
        else:
            if word[0] == '"' and "\\" in word:
                _check_escapes(word, end)
            is_key = bool(path) and path[-1] is None
            if is_key:
                path[-1] = json.loads(word)
            here = tuple(path)
            if is_key and here in lines:
                twice.append((here, lines[here], line))
            if is_key or (path and isinstance(path[-1], int)):
                lines[here] = line
            if word in "{[":
                path.append(None if word == "{" else 0)
            if len(path) > _DEEPEST:
                raise RecursionError
    return lines, twice


def _check_escapes(token: str, position: int) -> None:
    """Refuse a Windows path whose single backslashes are escapes by chance, and half of a surrogate pair."""
    if _DRIVE.match(token, 1):
        raise _SyntaxError(_backslash(token[1:-1]), position)
    try:
        json.loads(token).encode()
    except UnicodeEncodeError:
        raise _SyntaxError("half of a surrogate pair (\\ud800 to \\udfff) inside text", position) from None


def _explained(text: str, error: json.JSONDecodeError) -> tuple[str, int]:
    """Return the problem with its remedy, and the position."""
    if error.msg.startswith(("Invalid", "Unterminated")):
        return _explained_string(text, error)
    at = len(text) - len(text[error.pos :].lstrip())
    before = text[:at].rstrip()
    opened, found = _open_bracket(before), text[at : at + 1]
    if text.startswith(("//", "/*", "#"), at):
        return _COMMENT, at
    if quoted := _QUOTED.match(text, at):
        kind = "single" if found == "'" else "curly"
        return f'{kind} quotes; JSON takes straight double ones: "{_clip(quoted[1])}"', at
    if not found or (found in ":}" and text[opened] == "[" and error.msg.startswith("Expecting ','")):
        bracket = text[opened]
        return f"the {bracket} is never closed: a {'}' if bracket == '{' else ']'} is missing", opened
    comma = at if found == "," else len(before) - 1  # Python 3.13 points at the comma
    if text[comma] == "," and text[comma + 1 :].lstrip()[:1] in ("}", "]"):
        return "the comma after the last entry must go", comma
    following, tail = _WORD.match(text, at), _TAIL.search(text, 0, at)
    start = tail.start() if tail and following else at
    word = _clip(text[start : following.end()]) if following else found
    if start < at or (following and error.msg.startswith("Expecting value")):
        return _explained_literal(word), start
    if error.msg.startswith("Expecting ','") and found not in ":]":
        return "a comma is missing after this entry", len(before) - 1
    sentence = next((words for prefix, words in _PLAIN.items() if error.msg.startswith(prefix)), "")
    return f"found {word} {sentence}", at


def _explained_literal(word: str) -> str:
    if word[0] in "+-.0123456789":
        return f"{word} is not a JSON number; write it as in 0.5, 1000 or 1e-6"
    if word.lower() in _MEANT:
        return f"{word} is not JSON; write {_MEANT[word.lower()]}"
    return f'{word} is neither a number nor true, false or null; text stands in double quotes: "{word}"'


def _open_bracket(text: str) -> int:
    """Return the position of the innermost bracket that is open at the end of valid JSON so far."""
    opened: list[int] = [0]
    for token in _TOKEN.finditer(text):
        if token[0] in "{[":
            opened.append(token.start())
        elif token[0] in "}]":
            opened.pop()
    return opened[-1]


def _explained_string(text: str, error: json.JSONDecodeError) -> tuple[str, int]:
    at = error.pos
    line_start, line_end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    line_end = len(text) if line_end < 0 else line_end
    starts = [found.start() for found in _STRING.finditer(text, line_start, line_end) if found.start() <= at]
    start = starts[-1] if starts else at
    raw = text[start + 1 : line_end].partition('"')[0]
    if "\\" in raw:
        return _backslash(raw), start
    if re.search(f"[{_CURLY}]", raw):
        return "text is closed by a curly quote; JSON takes straight double ones", start
    if at < line_end and not error.msg.startswith("Unterminated"):
        return "a tab or another control character inside text; write a space, or \\t", at
    return 'text is never closed: a " is missing at the end of the line', start


def _backslash(raw: str) -> str:
    single = raw.replace("\\\\", "\\")
    slashes, doubled = single.replace("\\", "/"), single.replace("\\", "\\\\")
    return (
        f'a single backslash is an escape in JSON; write / ("{_clip(slashes)}") or \\\\ ("{_clip(doubled)}")'
    )


def _spelled(path: KeyPath) -> str:
    """Return a path inside a file as messages spell it: base.betas[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _clip(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
