"""Problems and notes: their places, and the sentences about wrong values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from trainer.config.schema import Key, accepts

_TINIEST = 1e-37
"""About the smallest fp32 number whose inverse is one too."""

COMMAND_LINE = "--"
"""The command line as the file of a `Place`."""


@dataclass(frozen=True)
class Place:
    """The place of a problem or note: a file by its name in messages, and line, key and column if known."""

    file: str
    line: int | None = None
    key: str = ""
    column: int | None = None

    def __str__(self) -> str:
        if self.file == COMMAND_LINE:
            return f"--{self.key}" if self.key else "command line"
        file = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return f"{file}: {self.key}" if self.key else file

    @property
    def origin(self) -> str:
        """The place without the key: train.json:3, or the option on the command line."""
        return str(self if self.file == COMMAND_LINE else self.at(""))

    def at(self, key: str) -> Place:
        """Return the place of a key inside this one that has no line of its own."""
        return Place(self.file, self.line, key)


@dataclass(frozen=True)
class Written:
    """A value, its place, and the folder of its file (None: the command line)."""

    value: Any
    place: Place
    folder: Path | None = None


@dataclass
class Report:
    """The problems of a configuration, and notes for its author."""

    files: list[str] = field(default_factory=lambda: [COMMAND_LINE])
    """The files in the order in which their problems are shown."""
    _errors: list[tuple[Place, str]] = field(default_factory=list)
    _notes: list[tuple[Place, str]] = field(default_factory=list)

    def error(self, place: Place, sentence: str) -> None:
        """Add a problem; the run is refused."""
        self._know(place)
        self._errors.append((place, sentence))

    def note(self, place: Place, sentence: str) -> None:
        """Add a note; the run is not refused."""
        self._know(place)
        self._notes.append((place, sentence))

    @property
    def errors(self) -> tuple[str, ...]:
        """The problems by file and line, each once."""
        return self._sorted(self._errors)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes by file and line, each once."""
        return self._sorted(self._notes)

    def _know(self, place: Place) -> None:
        if place.file not in self.files:
            self.files.append(place.file)

    def _sorted(self, entries: Iterable[tuple[Place, str]]) -> tuple[str, ...]:
        ordered = sorted(entries, key=lambda entry: (self.files.index(entry[0].file), entry[0].line or 0))
        return tuple(dict.fromkeys(f"{place}: {sentence}" for place, sentence in ordered))


def checked(key: Key, value: Any, place: Place, report: Report, hint: str = "") -> tuple[bool, Any]:
    """Return whether `value` fits the key, and it as the field's type; report problems, with `hint`."""
    if isinstance(value, float) and not math.isfinite(value) and value != key.default:
        sentence = f"{shown(value)} is not a number to train with; write a number, or null for the default"
        report.error(place, sentence)
        return False, None
    try:
        read = key.validate(value)
        if read == key.default or all(map(_computable, read if isinstance(read, tuple) else [read])):
            return True, read
        report.error(place, f"{shown(value)} is too large or too small a number to compute with{hint}")
    except ValidationError as error:
        for inner, sentence in _sentences(key, value, error):
            where = place.key + "".join(
                f"[{index}]" if isinstance(index, int) else f".{index}" for index in inner
            )
            report.error(place.at(where), sentence + hint)
    return False, None


def read_keys(
    members: Mapping[str, Written],
    known: Mapping[str, Key],
    report: Report,
    *,
    foreign: Callable[[str, Written], None] | None = None,
    hint: Callable[[str, Any], str] = lambda name, value: "",
) -> dict[str, Written]:
    """Return the keys of an object whose values fit; null stands for the default and is dropped.

    Args:
        foreign: handles a key that is not `known`; without it, such a key is reported.
        hint: returns the words to append to the sentence about a wrong value.
    """
    fitting: dict[str, Written] = {}
    for name, written in members.items():
        if name not in known:
            if foreign:
                foreign(name, written)
            else:
                report.error(written.place, unknown_key(name, known))
        elif written.value is not None:
            right, value = checked(
                known[name], written.value, written.place, report, hint(name, written.value)
            )
            if right:
                fitting[name] = replace(written, value=value)
    return fitting


def values_of(written: Mapping[str, Written]) -> dict[str, Any]:
    """Return the bare values by key."""
    return {name: entry.value for name, entry in written.items()}


def _computable(value: Any) -> bool:
    """Return whether a number fits the 64 bits of counts, or the 32 of weights."""
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return not isinstance(value, float) or value == 0 or _TINIEST < abs(value) < 1 / _TINIEST


def _sentences(key: Key, value: Any, error: ValidationError) -> list[tuple[tuple[int | str, ...], str]]:
    """Return each problem as a path inside the value and a sentence."""
    if len(key.variants) > 1:
        # pydantic reports every member of a union; a list or no list, or a number, shows the intended one.
        kinds = {kind: get_origin(_plain(kind)) for kind in key.variants}
        number = isinstance(value, int | float)
        meant = [
            kind
            for kind, origin in kinds.items()
            if (origin is tuple) == isinstance(value, list) and not (number and origin is Literal)
        ]
        if len(meant) != 1:
            return [((), f"must be {accepts(key.annotation)}; got {shown(value)}")]
        try:
            replace(key, annotation=meant[0]).validate(value)
        except ValidationError as narrower:
            error = narrower
    return [_sentence(key, value, entry) for entry in error.errors()]


def _sentence(key: Key, value: Any, entry: Any) -> tuple[tuple[int | str, ...], str]:
    limits, got = entry.get("ctx", {}), shown(entry["input"])
    match entry["type"]:
        case "literal_error":
            return entry["loc"], unknown_value(entry["input"], get_args(key.kind))
        case "greater_than":
            return entry["loc"], f"must be greater than {_bound(limits['gt'])}, got {got}"
        case "greater_than_equal":
            return entry["loc"], f"must be at least {_bound(limits['ge'])}, got {got}"
        case "less_than":
            return entry["loc"], f"must be less than {_bound(limits['lt'])}, got {got}"
        case "less_than_equal":
            return entry["loc"], f"must be at most {_bound(limits['le'])}, got {got}"
        case "multiple_of":
            step = limits["multiple_of"]
            below = entry["input"] // step * step
            nearest = (
                f"the nearest are {below} and {below + step}" if below > 0 else f"the smallest is {step}"
            )
            return entry["loc"], f"must be a multiple of {step}, got {got}; {nearest}"
        case "extra_forbidden":
            return entry["loc"], "unknown key"
        case "too_short":
            return entry["loc"], "is an empty list"
    sentence = f"must be {accepts(key.annotation)}; got {shown(value)}"
    if isinstance(value, str) and value.lower() in ("true", "false", "null", "none"):
        return (), sentence + "; write it without the quotes"
    if isinstance(value, str) and _is_number(value):
        return (), sentence + "; write the number without the quotes"
    return (), sentence


def unknown_value(value: Any, choices: Sequence[Any]) -> str:
    """Return the sentence about a value that is none of `choices`."""
    close = did_you_mean(value, choices)
    return f"unknown value {shown(value)}" + (
        close or f"; accepted are {', '.join(repr(choice) for choice in choices)}"
    )


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Return the sentence about a key that is none of `known`."""
    return "unknown key" + (did_you_mean(name, known) or f"; accepted are {', '.join(known)}")


def did_you_mean(found: Any, known: Iterable[Any]) -> str:
    """Return "; did you mean 'x'?" for the known word that is closest to `found`, or nothing."""
    close = closest(str(found), [word for word in known if isinstance(word, str)])
    return f"; did you mean '{close}'?" if close else ""


def closest(found: str, known: Iterable[str]) -> str | None:
    """Return the known word that `found` is most likely a misspelling of."""
    spelled = {word.lower(): word for word in known}
    close = get_close_matches(found.lower(), spelled, n=1, cutoff=0.7)
    return spelled[close[0]] if close else None


def shown(value: Any) -> str:
    """Return a value for messages: text in single quotes, everything else as JSON."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:76] + " ..."


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _bound(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
