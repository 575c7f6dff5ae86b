"""Where text leaves for people: no file name, key or value can steer a terminal or forge a line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Control characters, what ends a line or turns the direction of text, and halves of surrogate pairs. Joiners
# stay: emoji need them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str, encoding: str = "utf-8") -> str:
    """Return a text as one line, every character that is unsafe to show or that `encoding` lacks spelled as an escape."""
    line = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return line.encode(encoding, "backslashreplace").decode(encoding)


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
    """Send a stream nowhere from now on if its terminal was closed, or the program at the other end of its pipe has ended."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # what is still in the stream's buffer goes there too
        os.close(nowhere)


def open_streams() -> None:
    """Send nowhere the standard streams that were closed when the program started.

    The next file to be opened would take the number of one, and libraries' messages would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
