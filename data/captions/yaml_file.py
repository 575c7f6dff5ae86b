"""A YAML file beside the image, or for a folder, with words and settings under EveryDream2's keys.

The parser's events are read here and nothing is ever constructed from them but dicts, lists and strings. No
tag can run code, and aliases bring no more text than a file may hold. Depth is bounded before libyaml, which
recurses when it composes a document, could overflow the stack.
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
_TAGS = (
    "!",
    *(
        f"tag:yaml.org,2002:{kind}"
        for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
    ),
)
_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass
class _Anchors:
    """The values that aliases stand for."""

    values: dict[str, Any] = field(default_factory=dict)
    left: int = LARGEST_YAML
    """Characters that aliases may still bring in."""

    def value(self, event: Any, file: str) -> Any:
        """Return what an alias stands for."""
        if event.anchor not in self.values:
            raise FileError(f"{file}:{_line(event)}: nothing above is marked &{event.anchor}")
        value = self.values[event.anchor]
        self.left -= _size(value)
        if self.left < 0:
            raise FileError(
                f"{file}:{_line(event)}: aliases repeat more than {LARGEST_YAML >> 10} KiB; write fewer of them"
            )
        return value


@dataclass(frozen=True)
class YamlFile:
    """The file of the image's name with the extension .yaml or .yml."""

    suffix: str

    def read(self, stem: str, folder: Folder) -> Entry | None:
        """Return what the file says, or None where there is none.

        Raises:
            FileError: the file is there but cannot be used.
        """
        name = folder.beside(stem, self.suffix)
        return None if name is None else read_yaml(folder.path / name, self.suffix)


def read_yaml(path: Path, source: str) -> Entry:
    """Return what a YAML file says.

    Scalars are taken as they are written, so that a caption may be `no` or `2024`.

    Raises:
        FileError: the file cannot be read, is not YAML or holds a value that cannot be used; the reason names
        file and line.
    """
    text = read_text(path, LARGEST_YAML)
    try:
        values, lines = _document(yaml.parse(text, Loader=_LOADER), path.name)
    except yaml.YAMLError as error:
        raise FileError(_said(error, path.name, text)) from error
    return read_entry(values, file=path.name, source=source, lines=lines)


def _document(events: Iterator[Any], file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the keys and values of the mapping that a file holds, and the line of each key."""
    next(events)  # the start of the stream
    if isinstance(next(events), yaml.StreamEndEvent):
        return {}, {}
    lines: dict[str, int] = {}
    anchors = _Anchors()
    first = next(events)
    if isinstance(first, yaml.ScalarEvent) and _scalar(first) is None:
        values: Any = {}
    elif isinstance(first, yaml.MappingStartEvent):
        values = _value(first, events, anchors, file, 0, lines)
    else:
        raise FileError(f"{file}:{_line(first)}: must hold keys and values such as main_prompt: a cat")
    next(events)  # the end of the document
    last = next(events)
    if not isinstance(last, yaml.StreamEndEvent):
        raise FileError(f"{file}:{_line(last)}: a second document begins here; keep one")
    return values, lines


def _value(
    event: Any,
    events: Iterator[Any],
    anchors: _Anchors,
    file: str,
    depth: int,
    lines: dict[str, int] | None = None,
) -> Any:
    """Return the dict, list, string or None that begins with `event`; the line of each key of a dict goes into `lines`."""
    if isinstance(event, yaml.AliasEvent):
        return anchors.value(event, file)
    if event.tag is not None and event.tag not in _TAGS:
        raise FileError(f"{file}:{_line(event)}: the tag {event.tag} is not accepted; remove it")
    if depth > _DEEPEST:
        raise FileError(f"{file}:{_line(event)}: brackets or indents are nested more than {_DEEPEST} deep")
    value: Any
    if isinstance(event, yaml.ScalarEvent):
        value = _scalar(event)
    elif isinstance(event, yaml.SequenceStartEvent):
        value = []
        while not isinstance(inner := next(events), yaml.SequenceEndEvent):
            value.append(_value(inner, events, anchors, file, depth + 1))
    else:
        value = {}
        while not isinstance(inner := next(events), yaml.MappingEndEvent):
            key = _value(inner, events, anchors, file, depth + 1)
            if not isinstance(key, str):
                raise FileError(f"{file}:{_line(inner)}: a key must be a word")
            if key in value:
                raise FileError(f"{file}:{_line(inner)}: {key}: stands here twice; keep one")
            if lines is not None:
                lines[key] = _line(inner)
            value[key] = _value(next(events), events, anchors, file, depth + 1)
    if event.anchor is not None:
        anchors.values[event.anchor] = value
    return value


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


def _said(error: yaml.YAMLError, file: str, text: str) -> str:
    """Return the parser's complaint in one sentence, with the line."""
    mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
    line = (
        mark.line + 1
        if mark is not None
        else text.count("\n", 0, position) + 1
        if isinstance(position, int)
        else None
    )
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
    hint = "; put a text that holds a colon into quotes" if "mapping values" in said else ""
    return f"{file}{'' if line is None else f':{line}'}: is not YAML ({said}){hint}"
