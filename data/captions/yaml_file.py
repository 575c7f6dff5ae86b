"""A YAML file beside the image, or for a folder, with EveryDream2's keys.

The parser's events are read here and become nothing but dicts, lists and strings. No tag can run code, and
aliases bring no more text than a file may hold. Depth is bounded here, since libyaml recurses when it
composes a document and could overflow the stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.captions.entry import Entry, read_entry
from data.captions.text import read_text
from data.errors import FileError
from data.folder import Folder

LARGEST_YAML = 1 << 17
"""Bytes; a longer file holds something else."""

_DEEPEST = 8
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KINDS = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
_TAGS = ("!", *(f"tag:yaml.org,2002:{kind}" for kind in _KINDS))
_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class YamlFile:
    """The file with the image's name and the extension .yaml or .yml."""

    suffix: str

    def read(self, stem: str, folder: Folder) -> Entry | None:
        """Read the file, if there is one."""
        name = folder.beside(stem, self.suffix)
        return None if name is None else read_yaml(folder.path / name, self.suffix)


def read_yaml(path: Path, source: str) -> Entry:
    """Read a YAML file. Scalars stay text, so that a caption may be `no` or `2024`.

    Raises:
        FileError: it cannot be read, is not YAML or holds an unusable value; the reason names file and line.
    """
    text = read_text(path, LARGEST_YAML)
    document = _Document(yaml.parse(text, Loader=_LOADER), path.name)
    try:
        values = document.read()
    except yaml.YAMLError as error:
        raise FileError(_reason(error, path.name, text)) from error
    return read_entry(values, file=path.name, source=source, lines=document.lines)


@dataclass
class _Document:
    """The events of a file that holds one mapping."""

    events: Iterator[Any]
    file: str
    lines: dict[str, int] = field(default_factory=dict)
    """The line of each key of the mapping."""
    anchors: dict[str, Any] = field(default_factory=dict)
    left: int = LARGEST_YAML
    """Characters that aliases may still repeat."""

    def read(self) -> dict[str, Any]:
        next(self.events)  # the start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return {}
        first = next(self.events)
        if isinstance(first, yaml.ScalarEvent) and _scalar(first) is None:
            values: Any = {}
        elif isinstance(first, yaml.MappingStartEvent):
            values = self.value(first, 0)
        else:
            raise self.error(first, "must hold keys and values such as main_prompt: a cat")
        next(self.events)  # the end of the document
        last = next(self.events)
        if not isinstance(last, yaml.StreamEndEvent):
            raise self.error(last, "a second document starts here; keep one")
        return values

    def value(self, event: Any, depth: int) -> Any:
        """Return the dict, list, string or None that starts with `event`."""
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        if event.tag is not None and event.tag not in _TAGS:
            raise self.error(event, f"the tag {event.tag} is not accepted; remove it")
        if depth > _DEEPEST:
            raise self.error(event, f"brackets or indents are nested more than {_DEEPEST} deep")
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(inner := next(self.events), yaml.SequenceEndEvent):
                value.append(self.value(inner, depth + 1))
        else:
            value = self.mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        return value

    def mapping(self, depth: int) -> dict[str, Any]:
        value: dict[str, Any] = {}
        while not isinstance(inner := next(self.events), yaml.MappingEndEvent):
            key = self.value(inner, depth + 1)
            if not isinstance(key, str):
                raise self.error(inner, "a key must be a word")
            if key in value:
                raise self.error(inner, f"{key}: stands here twice; keep one")
            if depth == 0:
                self.lines[key] = _line(inner)
            value[key] = self.value(next(self.events), depth + 1)
        return value

    def alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            raise self.error(event, f"nothing above is marked &{event.anchor}")
        value = self.anchors[event.anchor]
        self.left -= _size(value)
        if self.left < 0:
            raise self.error(event, f"aliases repeat more than {LARGEST_YAML >> 10} KiB; write fewer of them")
        return value

    def error(self, event: Any, reason: str) -> FileError:
        return FileError(f"{self.file}:{_line(event)}: {reason}")


def _size(value: Any) -> int:
    """Return the characters of a value, each item one more."""
    if isinstance(value, dict):
        return sum(len(key) + 1 + _size(item) for key, item in value.items())
    return sum(map(_size, value)) + 1 if isinstance(value, list) else len(value or "") + 1


def _scalar(event: yaml.ScalarEvent) -> str | None:
    plain = event.style is None or event.style == ""
    return None if plain and event.value in _NULLS else event.value


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def _reason(error: yaml.YAMLError, file: str, text: str) -> str:
    """Return the parser's complaint in one sentence, with the line."""
    mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
    place = file
    if mark is not None:
        place = f"{file}:{mark.line + 1}"
    elif isinstance(position, int):
        place = f"{file}:{text.count(chr(10), 0, position) + 1}"
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
    hint = "; put a text that holds a colon into quotes" if "mapping values" in problem else ""
    return f"{place}: is not YAML ({problem}){hint}"
