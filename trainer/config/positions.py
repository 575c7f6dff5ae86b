"""Read JSON strictly, and remember in which line every key and value stands.

`json.loads` accepts NaN and duplicate keys in silence, stops at the first mistake and knows no line of a
value. This reader notes a mistake, goes on with the next line where it can, and names each mistake in words a
person editing by hand understands.
"""

from __future__ import annotations

import codecs
import math
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, NoReturn

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the top, for instance ("base", "betas", 1)."""

_DEEPEST = 40
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[^\s,:{}\[\]\"“”„‟/#]+")
_REST = re.compile(r"[^,\]}\n]+")
_KEY = re.compile(r'"(?:[^"\\\n]|\\.)*"\s*:')
_CURLY = "“”„‟"
_DRIVE = re.compile(r"[A-Za-z]:\\(?!\\)|\\\\[A-Za-z][\w.-]{2,}\\(?!u[0-9A-Fa-f]{4})[A-Za-z]\w{2,}")
_CONSTANTS = {"true": True, "false": False, "null": None}
_MEANT = {
    "true": "true",
    "false": "false",
    "none": "null",
    "null": "null",
    "yes": "true",
    "no": "false",
    "on": "true",
    "off": "false",
}


@dataclass(frozen=True)
class Issue:
    """One mistake in a file: its line (None: the whole file), the key it belongs to, and a sentence without a full stop."""

    line: int | None
    path: KeyPath
    sentence: str


@dataclass
class Document:
    """What a file says, as far as it could be read.

    Attributes:
        values: the top-level object; a value that could not be read is None and named in `unread`.
        lines: the line of every key, and of every list item.
        unread: where the text is no value, so that nothing more can be said about it.
        hides_keys: whether there may be keys that were not found, because the text around them makes no
        sense.
        issues: what is wrong with the text, in order.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    unread: set[KeyPath] = field(default_factory=set)
    hides_keys: bool = False
    issues: list[Issue] = field(default_factory=list)


def read_json(content: bytes) -> Document:
    """Return the object that a file's bytes spell in UTF-8, with or without a byte order mark; never raises for bad content.

    Infinity is reported like NaN except as the value of `growth_rate`, where EveryDream2 writes it for "no
    limit".
    """
    for mark, name in ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if content.startswith(mark):
            return _unreadable(f"the file is saved as {name}; save it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\x00" in content:
        return _unreadable("the file is not text (it holds zero bytes); name a JSON file saved as UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _unreadable(f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8", line)
    if not text.strip():
        return _unreadable("the file is empty; it must hold an object: { ... }")
    return _Reader(text).document()


def _unreadable(sentence: str, line: int | None = None) -> Document:
    return Document(hides_keys=True, issues=[Issue(line, (), sentence)])


class _Stop(Exception):
    """Skip to the next line; the mistake is noted already."""


class _Broken:
    """Stands for a value that could not be read, where reading goes on behind it."""


_BROKEN = _Broken()


class _Reader:
    """A recursive-descent reader over one text. `at` is the position of the next character, `path` the key that is being read."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n").replace("\r", "\n")
        self.at = 0
        self.path: KeyPath = ()
        self.result = Document()
        self._starts = [0, *(found.end() for found in re.finditer("\n", self.text))]

    def document(self) -> Document:
        """Read the whole text."""
        try:
            self._space()
            if self._next() != "{":
                opening = self._next()
                what = {"[": "a list", '"': "text"}.get(opening, f"'{self._rest()}'")
                self._stop(f"the file must hold an object in braces, {{ ... }}, but begins with {what}")
            self._object(self.result.values)
            self._space()
            if self._next():
                self._note("text after the closing }: remove it, or move it before the brace")
        except _Stop:
            self.result.hides_keys = True
        return self.result

    def _value(self) -> Any:
        character = self._next()
        if character == "{":
            return self._object({})
        if character == "[":
            return self._list()
        if character == '"':
            return self._straight()
        if character == "'" or character in _CURLY:
            return self._odd_quotes()
        return self._literal()

    def _object(self, values: dict[str, Any]) -> dict[str, Any]:
        here, opened = self.path, self.at
        self._deeper()
        self.at += 1
        comma: int | None = None
        while True:
            self._space()
            if not self._next():
                self._stop(f"the {{ of line {self._line(opened)} is never closed: a }} is missing")
            if self._next() == "}":
                if comma is not None:
                    self._note("the comma after the last entry must go", comma)
                self.at += 1
                return values
            if self._next() == ",":
                self._note("a comma without an entry before it: remove it")
                self.at += 1
                continue
            try:
                entry = self._member(here, values)
                self.path = here
                comma = self._separator("}", entry)
            except _Stop:
                self.path, comma = here, None
                if not self._next_line():
                    raise

    def _member(self, here: KeyPath, values: dict[str, Any]) -> KeyPath:
        """Read one `"key": value` into `values` and return its path."""
        start = self.at
        if self._next() not in "\"'" + _CURLY:
            self._bad_key()
        key = self._value()
        if isinstance(key, _Broken):
            self.result.hides_keys = True
            raise _Stop
        self.path = (*here, key)
        if key in values:
            self._note(
                f"written twice, first in line {self.result.lines[self.path]}; keep one of the two", start
            )
        else:
            self.result.lines[self.path] = self._line(start)
            self.result.unread.add(self.path)
        self._space()
        if self._next() != ":":
            found = f"found {self._next()}" if self._next() else "found the end of the file"
            self._stop(f"a : must follow the key, {found}", start)
        self.at += 1
        self._space()
        if self._next() in (",", "}", ""):
            self._note("the value after the : is missing; write one, or null for the default", start)
            return self.path
        first = key not in values
        values.setdefault(key, None)  # so that a second one is noticed even where the first cannot be read
        value = self._value()
        if first and not isinstance(value, _Broken):
            self.result.unread.discard((*here, key))
            values[key] = value
        return (*here, key)

    def _list(self) -> list[Any] | _Broken:
        here, opened = self.path, self.at
        self._deeper()
        self.at += 1
        values: list[Any] = []
        comma: int | None = None
        broken = False
        while True:
            self._space()
            if not self._next() or self._next() in "}:" or _KEY.match(self.text, self.at):
                if not broken:
                    self._note("the list is never closed: a ] is missing", opened)
                self.at = self.at if comma is None else comma
                return _BROKEN
            if self._next() == "]":
                if comma is not None:
                    self._note("the comma after the last item of the list must go", comma)
                self.at += 1
                return _BROKEN if broken else values
            if self._next() == ",":
                self._note("a comma without an item before it: remove it")
                self.at += 1
                continue
            self.path = (*here, len(values))
            self.result.lines[self.path] = self._line()
            try:
                values.append(self._value())
                self.path = here
                broken = broken or isinstance(values[-1], _Broken)
                comma = self._separator("]", (*here, len(values) - 1))
            except _Stop:
                self.path, comma, broken = here, None, True
                if not self._next_line():
                    raise

    def _separator(self, closing: str, entry: KeyPath) -> int | None:
        """Read what follows an entry: a comma, whose position is returned, or the closing bracket, which stays."""
        end = self.at
        self._space()
        if self._next() == ",":
            self.at += 1
            return self.at - 1
        if self._next() in ("", closing) or (
            closing == "]" and (self._next() == "}" or _KEY.match(self.text, self.at))
        ):
            return None
        if self._next() == "]":
            self._note("a ] that closes nothing: remove it")
            self.at += 1
            return self._separator(closing, entry)
        self.path, here = entry, self.path
        self._note("a comma is missing after it", end - 1)
        self.path = here
        return None

    def _odd_quotes(self) -> str | _Broken:
        quote, line_end = self._next(), self._line_end()
        closers, name = (_CURLY + '"', "curly") if quote in _CURLY else ("'", "single")
        for end in range(self.at + 1, line_end):
            if self.text[end] in closers:
                inner = self.text[self.at + 1 : end]
                self._note(f'{name} quotes; JSON takes straight double ones: "{_clip(inner)}"')
                self.at = end + 1
                return inner
        self._stop("text is never closed: a quote is missing at the end of the line")

    def _straight(self) -> str | _Broken:
        start, line_end = self.at + 1, self._line_end()
        end = start
        while end < line_end and self.text[end] != '"':
            end += 2 if self.text[end] == "\\" else 1
        raw = self.text[start:end]
        if end >= line_end or _DRIVE.match(raw):
            simple = self.text.find(
                '"', start, line_end
            )  # in "C:\pictures\" the last backslash swallows the quote
            curly = re.compile(f"[{_CURLY}]").search(self.text, start, line_end)
            if simple >= 0 and "\\" in self.text[start:simple]:
                self._backslash(self.text[start:simple])
                self.at = simple + 1
                return _BROKEN
            if curly:
                self._note("text is closed by a curly quote; JSON takes straight double ones")
                self.at = curly.end()
                return self.text[start : curly.start()]
            self._stop('text is never closed: a " is missing at the end of the line')
        if any(character < " " for character in raw):
            self._note("a tab or another control character inside text; write a space, or \\t")
            self.at = end + 1
            return _BROKEN
        value = self._unescaped(raw)
        self.at = end + 1
        return value

    def _unescaped(self, raw: str) -> str | _Broken:
        if "\\" not in raw:
            return raw
        pieces: list[str] = []
        i = 0
        while i < len(raw):
            if raw[i] != "\\":
                pieces.append(raw[i])
                i += 1
            elif raw[i + 1] in _ESCAPES:
                pieces.append(_ESCAPES[raw[i + 1]])
                i += 2
            elif raw[i + 1] == "u" and re.fullmatch("[0-9a-fA-F]{4}", raw[i + 2 : i + 6]):
                pieces.append(chr(int(raw[i + 2 : i + 6], 16)))
                i += 6
            else:
                self._backslash(raw)
                return _BROKEN
        try:
            return "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._note("half of a surrogate pair (\\ud800 to \\udfff) inside text")
            return _BROKEN

    def _backslash(self, raw: str) -> None:
        single = raw.replace("\\\\", "\\")
        slashes, doubled = single.replace("\\", "/"), single.replace("\\", "\\\\")
        self._note(
            f'a single backslash is an escape in JSON; write / ("{_clip(slashes)}") or \\\\ ("{_clip(doubled)}")'
        )

    def _literal(self) -> Any:
        start, word = self.at, self._word()
        self.at += len(word)
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if _NUMBER.fullmatch(word):
            return self._number(word)
        if not word:
            self._stop(f"found {self._next()} where a value must stand")
        if word == "Infinity" and self.path[-1:] == ("growth_rate",):
            return math.inf
        if word.lstrip("+-").lower() in ("infinity", "inf", "nan"):
            self._note(
                f"{word} is not a number to train with; write a number, or null for the default", start
            )
        elif word.lower() in _MEANT:
            self._note(f"{word} is not JSON; write {_MEANT[word.lower()]}", start)
        elif number := _repaired(word):
            self._note(f"{word} is not a JSON number; write {number}", start)
        else:
            self.at = start
            rest = self._rest()
            self.at += len(rest)
            shown = _clip(rest.strip())
            self._note(
                f'{shown} is neither a number nor true, false or null; text stands in double quotes: "{shown}"',
                start,
            )
        return _BROKEN

    def _number(self, word: str) -> int | float | _Broken:
        if re.fullmatch(r"-?[0-9]{1,100}", word):
            return int(word)
        number = float(word)
        if math.isinf(number) or len(word) > 100:
            self._note(f"{_clip(word, 20)} is too long or too large for a number")
            return _BROKEN
        return number

    def _bad_key(self) -> NoReturn:
        self.result.hides_keys = True
        word = self._word()
        if not word:
            self._stop(f"found {self._next()} where a key in double quotes must stand")
        if word[0].isdigit():
            self._stop(
                f"found {word} where a key must stand; a number takes a point, as in 1.5, and a list takes brackets: [0.9, 0.999]"
            )
        self._stop(f'a key stands in double quotes: "{_clip(word)}"')

    def _space(self) -> None:
        """Skip white space, and comments, which are noted."""
        while True:
            while self._next() and self._next() in " \t\n\u00a0\u200b\ufeff\u2028\u2029":
                self.at += 1
            comment = next((mark for mark in ("//", "/*", "#") if self.text.startswith(mark, self.at)), None)
            if comment is None:
                return
            self._note(
                'comments are not JSON: remove it, or write it as text under a key that starts with _, such as "_note"'
            )
            if comment == "/*":
                end = self.text.find("*/", self.at)
                self.at = len(self.text) if end < 0 else end + 2
            else:
                self.at = self._line_end()

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _word(self) -> str:
        found = _WORD.match(self.text, self.at)
        return found.group() if found else ""

    def _rest(self) -> str:
        """Return what stands here up to the next comma, closing bracket or the end of the line."""
        found = _REST.match(self.text, self.at)
        return found.group() if found else ""

    def _next_line(self) -> bool:
        """Go to the start of the next line; False at the end of the text."""
        self.at = min(self._line_end() + 1, len(self.text))
        return self.at < len(self.text)

    def _line_end(self) -> int:
        end = self.text.find("\n", self.at)
        return len(self.text) if end < 0 else end

    def _line(self, position: int | None = None) -> int:
        return bisect_right(self._starts, self.at if position is None else position)

    def _deeper(self) -> None:
        if len(self.path) > _DEEPEST:
            self.at, self.path = len(self.text), self.path[:1]
            self._stop(f"brackets are nested more than {_DEEPEST} deep")

    def _note(self, sentence: str, position: int | None = None) -> None:
        self.result.issues.append(Issue(self._line(position), self.path, sentence))

    def _stop(self, sentence: str, position: int | None = None) -> NoReturn:
        self._note(sentence, position)
        raise _Stop


def _repaired(word: str) -> str | None:
    """Return the JSON number that a number of another language most likely means: .5, +1, 007, 1., 1_000, 1e-6f, 1,5 is not one."""
    bare = word.replace("_", "").removeprefix("+").removesuffix("f")
    bare = re.sub(r"^(-?)0+(?=[0-9])", r"\1", bare)
    bare = re.sub(r"^(-?)\.", r"\g<1>0.", bare)
    bare = re.sub(r"\.(?=$|[eE])", ".0", bare)
    return bare if _NUMBER.fullmatch(bare) else None


def _clip(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
