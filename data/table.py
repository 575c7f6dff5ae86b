"""Lists of captioned images, as a data root or as a folder's metadata: JSON, JSONL, CSV and Parquet."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from data.captions.entry import Entry, read_entry
from data.captions.json_file import read_json
from data.captions.text import read_text
from data.errors import FileError
from data.regular import read_regular

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""Extensions of files that can be a data root."""

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of a folder's own list, as in Hugging Face's imagefolder."""

FILE_KEYS = ("image", "file_name", "image_path", "path")
"""Keys of a row's image in the order of precedence."""

LARGEST_TABLE = 1 << 28
"""Bytes; parsed JSON of nothing but brackets takes twenty times as much."""

MOST_ROWS, MOST_BAD = 5_000_000, 100_000
"""Rows of a list, and unusable ones: a file with more is no list of images."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a list."""

    file: str
    """As written."""
    entry: Entry
    place: str
    """The list and the row's line or number."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """An unusable row. `file` may be empty; `reason` ends the sentence that the image or `place` starts."""

    file: str
    place: str
    reason: str


@dataclass(frozen=True)
class Metadata:
    """The list of a folder's images, by relative path."""

    folder: Path
    name: str
    rows: Mapping[str, Row | BadRow]
    nameless: tuple[BadRow, ...]
    """Rows without an image."""
    repeated: tuple[Row | BadRow, ...] = ()
    """Rows whose image a later row repeats."""
    used: set[str] = field(default_factory=set)
    """Requested paths."""

    def row(self, below: str) -> Row | BadRow | None:
        """Return the row of an image by its relative path, with forward slashes."""
        key = _key(below)
        self.used.add(key)
        return self.rows.get(key)

    def left_over(self) -> list[Row | BadRow]:
        """Return the rows that were never requested."""
        return [row for key, row in self.rows.items() if key not in self.used]


def read_metadata(path: Path) -> Metadata:
    """Read a folder's list; of several rows for one image the last counts.

    Raises:
        FileError: it cannot be read, or names no image at all.
    """
    rows = read_table(path)
    named: dict[str, Row | BadRow] = {}
    repeated, nameless = [], []
    for row in rows:
        if row.file:
            if earlier := named.get(key := _key(row.file)):
                repeated.append(earlier)
            named[key] = row
        elif isinstance(row, BadRow):
            nameless.append(row)
    if nameless and not named:
        raise FileError(f"{path.name}: names no images; each row needs a {FILE_KEYS[1]}")
    return Metadata(path.parent, path.name, named, tuple(nameless), tuple(repeated))


def read_table(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a list; FileError if the list itself cannot be read."""
    readers = {".jsonl": _json_lines, ".csv": _csv_rows}
    if (kind := path.suffix.lower()) == ".parquet":
        found = _parquet_rows(path)
    else:
        found = readers.get(kind, _json_items)(read_text(path, LARGEST_TABLE), path.name)
    bad = 0
    for number, (place, values) in enumerate(found):
        row = values if isinstance(values, BadRow) else _row(values, place)
        bad += isinstance(row, BadRow)
        if bad > MOST_BAD or number >= MOST_ROWS:
            more = f"{MOST_BAD:,} rows that cannot be used" if bad > MOST_BAD else f"{MOST_ROWS:,} rows"
            raise FileError(f"{path.name}: has more than {more}; {place} was the last one read")
        yield row


def _row(values: Any, place: str) -> Row | BadRow:
    if not isinstance(values, dict):
        example = f'{{"{FILE_KEYS[1]}": "cat.jpg", "text": "a cat"}}'
        return BadRow("", place, f"must hold keys and values, such as {example}")
    key = next((key for key in FILE_KEYS if values.get(key)), None)
    if key is None or not isinstance(values[key], str):
        return BadRow("", place, f"names no image; a row needs a {FILE_KEYS[1]}")
    file = values[key]
    keys = {name: value for name, value in values.items() if name not in FILE_KEYS and not _missing(value)}
    try:
        return Row(file, read_entry(keys, file=place, source=place.partition(":")[0]), place)
    except FileError as error:
        return BadRow(file, place, error.reason)


def _missing(value: Any) -> bool:
    return value is None or value != value  # pandas writes NaN


def _json_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(StringIO(text), 1):
        if line.strip():
            place = f"{name}:{number}"
            try:
                yield place, read_json(line, name, number)
            except FileError as error:
                yield place, BadRow("", place, error.reason.removeprefix(f"{place}: "))


def _json_items(text: str, name: str) -> Iterator[tuple[str, Any]]:
    items = read_json(text, name)
    if isinstance(items, dict):  # kohya's: keys and values by the image's path
        pairs = [
            {"image": file, **(about if isinstance(about, dict) else {"caption": about})}
            for file, about in items.items()
        ]
        items = pairs if all(isinstance(about, dict | str) for about in items.values()) else None
    if not isinstance(items, list):
        example = '[{"image": "cat.jpg", "caption": "a cat"}]'
        raise FileError(f"{name}: must be a list of images, such as {example}")
    for number, values in enumerate(items, 1):
        yield f"{name}: image {number}", values


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, Any]]:
    header = text.partition("\n")[0]
    between = next((mark for mark in ",;\t" if mark in header), ",")  # Excel writes ; in much of Europe
    rows = csv.DictReader(StringIO(text, newline=""), delimiter=between, strict=True)
    while True:
        first = max(2, rows.line_num + 1)
        try:
            values = next(rows, None)
        except csv.Error as error:
            reason = "a quote is opened and never closed" if "end of data" in str(error) else error
            raise FileError(f"{name}:{first}: is not CSV ({reason})") from error
        if values is None:
            return
        place = f"{name}:{rows.line_num}"
        if None in values:
            marks = {",": "commas", ";": "semicolons", "\t": "tabs"}[between]
            reason = f"has more columns than the first line; put a text that holds {marks} into quotes"
            yield place, BadRow("", place, reason)
        else:
            yield place, {key.strip(): value or None for key, value in values.items() if key.strip()}


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    name = path.name
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table as read_parquet
    except ImportError as error:
        raise FileError(
            f"{name}: Parquet is read with the package pyarrow: pip install pyarrow, or save the list as "
            f"{METADATA[0]}"
        ) from error
    try:
        table = read_parquet(BytesIO(read_regular(path, LARGEST_TABLE)))
    except (ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or f"is it Parquet? {' '.join(str(error).split())}"
        raise FileError(f"{name}: cannot be read ({reason})") from error
    for number, values in enumerate(table.to_pylist(), 1):
        yield f"{name}: row {number}", values


def _key(path: str) -> str:
    path = path.replace("\\", "/").removeprefix("./")
    return path if path.isascii() else unicodedata.normalize("NFC", path)
