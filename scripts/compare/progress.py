"""Progress of a comparison: the step of the run that trains, and the time that all runs still need."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

_STEP = re.compile(rb"step (\d+)/(\d+)")
_TAIL = 4096
_EVERY = 60.0
"""Seconds between lines where stdout is no terminal."""


class Progress:
    """Show how far a run is; call `start` before each run, `show` while it trains and `end` after it.

    Args:
        count: the runs still to be trained.
        stream: a terminal shows one line that changes, anything else a line a minute.
        clock: returns seconds.
    """

    def __init__(
        self, count: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left = count
        self._stream = stream or sys.stdout
        self._clock = clock
        self._whole: list[float] = []
        self._words, self._output, self._skip = "", Path(), 0
        self._since = self._shown = 0.0

    def start(self, words: str, output: Path) -> None:
        """Start a run whose console output is appended to `output`."""
        self._words, self._output = words, output
        self._skip = output.stat().st_size if output.exists() else 0
        self._since = self._shown = self._clock()

    def show(self) -> None:
        """Show the run's step, if it is known and a line is due."""
        terminal, now = self._stream.isatty(), self._clock()
        if (step := self._step()) is None or (not terminal and now - self._shown < _EVERY):
            return
        done, total = step
        self._shown = now
        line = f"{self._words}: step {done}/{total}"
        if (left := self.left(done / total)) is not None:
            line += f", about {_duration(left)} left for all runs"
        print(
            f"\r{line}\x1b[K" if terminal else line,
            end="" if terminal else "\n",
            file=self._stream,
            flush=True,
        )

    def end(self) -> None:
        """End a run."""
        self._left -= 1
        self._whole.append(self._clock() - self._since)
        if self._stream.isatty():
            print("\r\x1b[K", end="", file=self._stream, flush=True)

    def left(self, share: float) -> float | None:
        """Return the seconds that all runs still need after a share of this one; None before 5%."""
        if self._whole:
            whole = sum(self._whole) / len(self._whole)
        elif share >= 0.05:
            whole = (self._clock() - self._since) / share
        else:
            return None
        return whole * (self._left - share)

    def _step(self) -> tuple[int, int] | None:
        """Return the run's step and its last one, as its console reported them last."""
        try:
            with self._output.open("rb") as file:
                end = file.seek(0, 2)
                file.seek(max(self._skip, end - _TAIL))
                found = _STEP.findall(file.read())
        except OSError:
            return None
        return (int(found[-1][0]), max(1, int(found[-1][1]))) if found else None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{round(seconds)} s"
