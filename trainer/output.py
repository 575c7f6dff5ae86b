"""Write text for people, so that no file name, key or value can steer a terminal or forge a line."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# Control characters, line ends, changes of text direction and halves of surrogate pairs. Joiners stay: emoji
# need them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


WIDTH = 110
"""Columns of a line for people, at most."""


def clean(text: str, encoding: str = "utf-8") -> str:
    """Return a text as one line, with escapes for characters that are unsafe or that `encoding` lacks."""
    line = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return line.encode(encoding, "backslashreplace").decode(encoding)


def shown_path(path: Path) -> str:
    """Return a path as messages show it: relative to the working directory if it lies inside."""
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def duration(seconds: float) -> str:
    """Return a time in words, in seconds below a minute and a half."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def counted(count: int, noun: str) -> str:
    """Return a number and what it counts, such as 1 image or 2,400 images."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def wrapped(line: str, *, hang: int, width: int = WIDTH, start: str = "") -> list[str]:
    """Break a line between words: `start` precedes the first part, `hang` spaces the others."""
    return textwrap.wrap(
        line,
        width,
        initial_indent=start,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    ) or [start + line]


def say(*lines: str, stream: TextIO) -> None:
    """Write lines to a stream, each cleaned."""
    with surviving(stream):
        print(
            *(clean(line, getattr(stream, "encoding", None) or "utf-8") for line in lines),
            sep="\n",
            file=stream,
            flush=True,
        )


@contextmanager
def surviving(stream: TextIO) -> Iterator[None]:
    """Send a stream to the null device from now on if its terminal or pipe was closed."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # the rest of the stream's buffer goes there too
        os.close(nowhere)


def open_streams() -> None:
    """Open the null device for standard streams that were closed when the program started.

    Otherwise the next file to be opened takes the number of one, and libraries write their messages into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
