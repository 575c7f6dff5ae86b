"""The checked content of one file about images: captions, tags and settings, under common keys."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data.captions.caption import Caption, Tag, parse_caption, squeeze
from data.errors import FileError

MOST_REPEATS = 10_000
"""The largest multiply; a larger number is a slip, and would fill the memory with one epoch's plan."""

WORDS = ("caption", "main_prompt", "text")
"""Keys of the caption in the order of precedence. main_prompt is not split into tags."""

_LONGEST_KEY = 40

ORDINARY_BATCH = "default_batch"
"""EveryDream2's batch_id of images without one."""


@dataclass(frozen=True, slots=True)
class Remark:
    """An oddity of a usable file; `place` is the file, with the line where it is known."""

    place: str
    text: str


@dataclass(frozen=True, slots=True)
class UnknownKey(Remark):
    """An unknown key that resembles no known one; `text` is the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The content of a file about an image, or about all images of a folder; None and () are absent keys."""

    captions: tuple[Caption, ...] = ()
    """Alternatives: each showing of the image draws one."""
    tags: tuple[Tag, ...] = ()
    """Tags to add to the caption, wherever it comes from."""
    source: str = ""
    multiply: float | None = None
    cond_dropout: float | None = None
    flip_p: float | None = None
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    loss_scale: float | None = None
    batch_id: str | None = None
    max_caption_length: int | None = None
    remarks: tuple[Remark, ...] = ()

    @property
    def has_words(self) -> bool:
        """True if a caption is not empty."""
        return any(not caption.empty for caption in self.captions)


NOTHING = Entry()


def read_entry(
    values: Mapping[str, Any], *, file: str, source: str, lines: Mapping[str, int] | None = None
) -> Entry:
    """Check the keys and values of a file.

    A value may have its JSON type or, in text files, be a string; None is an absent key.

    Args:
        file: its name in messages, with the line if all keys are on one.
        source: the `source` of captions.
        lines: the line of each key, from 1, if known.

    Raises:
        FileError: values cannot be used; the reason names all of them.
    """
    problems: list[str] = []
    remarks: list[Remark] = []
    found: dict[str, Any] = {}
    for key, value in values.items():
        number = (lines or {}).get(key)
        place = file if number is None else f"{file}:{number}"
        if key not in _READERS:
            remarks.append(_unknown(place, key))
        elif value is not None:
            try:
                found[key] = _READERS[key](value)
            except ValueError as error:
                problems.append(f"{place}: {key}: {error}")
    if problems:
        raise FileError("; ".join(problems))
    present = [key for key in WORDS if key in found]
    if len(present) > 1:
        remarks.append(Remark(file, f"it has {' and '.join(present)}; {present[0]} is used"))
    if "rating" in found:
        text = (
            "rating has no effect: rated datasets are not supported; multiply makes images count more or less"
        )
        remarks.append(Remark(file, text))
    whole = present[:1] == ["main_prompt"]
    captions = tuple(
        Caption(squeeze(text), (), source) if whole else parse_caption(text, source)
        for text in (found[present[0]] if present else ())
    )
    settings = {key: found[key] for key in SETTINGS if key in found}
    return Entry(
        captions=captions, tags=found.get("tags", ()), source=source, remarks=tuple(remarks), **settings
    )


def read_setting(key: str, text: str) -> Any:
    """Parse the value of one of `SETTINGS`.

    Raises:
        ValueError: the message says what is accepted.
    """
    return SETTINGS[key](text.strip())


def first_setting(entries: Iterable[Entry], key: str) -> Any:
    """Return the first value of a setting among entries in the order of precedence, or None."""
    return next((value for entry in entries if (value := getattr(entry, key)) is not None), None)


def _number(low: float, high: float = math.inf) -> Callable[[Any], float]:
    accepted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    comma = "," if high == math.inf else ""

    def read(value: Any) -> float:
        number = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                number = float(value)
        if not (low <= number <= high and math.isfinite(number)):
            raise ValueError(f"must be a number{comma} {accepted}; got {_shown(value)}")
        return number

    return read


def _whole(low: int) -> Callable[[Any], int]:
    number = _number(low, 1_000_000)

    def read(value: Any) -> int:
        try:
            exact = number(value)
        except ValueError:
            exact = math.nan
        if exact != exact or exact != int(exact):
            raise ValueError(f"must be a whole number, at least {low}; got {_shown(value)}")
        return int(exact)

    return read


def _switch(value: Any) -> bool:
    word = str(value).lower() if isinstance(value, str | bool | int) else ""
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"must be true or false; got {_shown(value)}")


def _name(value: Any) -> str:
    name = squeeze(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if not name:
        raise ValueError(f"must be a name; got {_shown(value)}")
    return "" if name == ORDINARY_BATCH else name


def _captions(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    odd = [text for text in texts if not isinstance(text, str)]
    if odd or not texts:
        got = _shown(odd[0] if odd else value)
        raise ValueError(f"must be text, or a list of texts of which one is drawn each time; got {got}")
    return tuple(texts)


def _tags(value: Any) -> tuple[Tag, ...]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list):
        raise ValueError(f"must be a list of tags; got {_shown(value)}")
    return tuple(tag for item in value if (tag := _tag(item)).text)


def _tag(item: Any) -> Tag:
    words, weight = item, None
    if isinstance(item, dict) and item.keys() <= {"tag", "weight"}:
        words, weight = item.get("tag"), item.get("weight")
    if words is None or isinstance(words, str):
        try:
            return Tag(squeeze(words or ""), 1.0 if weight is None else _number(0)(weight))
        except ValueError as error:
            raise ValueError(f"the weight of {words!r} {error}") from error
    raise ValueError(f"each must be a text or hold a tag and a weight; got {_shown(item)}")


SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "multiply": _number(0, MOST_REPEATS),
    "cond_dropout": _number(0, 1),
    "flip_p": _number(0, 1),
    "shuffle_tags": _switch,
    "keep_tags": _whole(0),
    "loss_scale": _number(0),
    "batch_id": _name,
    "max_caption_length": _whole(1),
}
"""By key, the parser of a setting from text or JSON; its result is the field of `Entry` of that name."""

_READERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(WORDS, _captions),
    "tags": _tags,
    **SETTINGS,
    "rating": lambda value: value,
}


def _unknown(place: str, key: str) -> Remark:
    shown = key if len(key) <= _LONGEST_KEY else key[:_LONGEST_KEY] + "..."
    if close := _closest(key):
        return Remark(place, f"unknown key {shown!r}; did you mean {close!r}?")
    return UnknownKey(place, shown)


@lru_cache(maxsize=4096)
def _closest(key: str) -> str | None:
    return next(iter(difflib.get_close_matches(key.lower(), _READERS, n=1, cutoff=0.75)), None)


def _shown(value: Any) -> str:
    match value:
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case None | bool():
            return {None: "nothing", True: "true", False: "false"}[value]
        case int() | float():
            return str(value)[:60]
    return "an object" if isinstance(value, dict) else "a list"
