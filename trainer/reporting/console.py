"""The console of a run: a progress bar, and a line for every event."""

from __future__ import annotations

import os
import shutil
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from trainer.networks import NETWORKS
from trainer.output import WIDTH, clean, say, surviving, wrapped

_BAR = (4, 20)
"""Columns of the progress bar: the fewest, for which numbers are omitted, and the most."""

_HANG = 2
"""Columns that the further parts of a sentence are indented by."""

_TIMED = 5
"""Steps of this start before the time left is shown."""

_RECENT = 100
"""Latest steps whose mean time counts."""


@dataclass(frozen=True)
class Report:
    """The numbers of a report, for people."""

    loss: float
    """Mean loss since the last report."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Effective learning rate by network."""
    images_per_second: float | None = None
    memory: int = 0
    """Bytes."""

    def parts(self) -> list[str]:
        """Return the numbers with their labels, the most important first."""
        parts = [f"loss {self.loss:.4g}"]
        if self.rates:
            rates = [f"{NETWORKS[network].short} {rate:.2g}" for network, rate in self.rates.items()]
            parts.append(f"lr {' '.join(rates)}")
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:.3g} images/s")
        if self.memory:
            parts.append(f"{self.memory / 2**30:.2f} GiB")
        return parts


class Console:
    """A progress bar below events in a terminal; elsewhere (a file, nohup, CI) a plain line per report.

    After `record_to`, events and reports also go to a file, with the time.

    Args:
        stream: standard output if None.
        enabled: false on ranks other than 0, which show and record nothing.
    """

    def __init__(self, *, stream: TextIO | None = None, enabled: bool = True) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: tqdm | None = None
        self._path: Path | None = None
        self._warned = False
        self._total = self._first = self._step = 0
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._epoch = ""
        self._numbers: list[str] = []

    def record_to(self, path: Path) -> None:
        """Append all later lines to `path` too."""
        self._path = path

    def event(self, sentence: str, *, hang: int | None = None, whole: bool = False) -> None:
        """Print an event on a line of its own, broken between words in a terminal.

        Args:
            sentence: the event.
            hang: break the line in pipes and files too; columns by which its further parts are indented.
            whole: leave the line as it is, since people copy it.
        """
        if not self._enabled:
            return
        width = min(WIDTH, shutil.get_terminal_size().columns - 1) if self._terminal else WIDTH
        if whole or (hang is None and not self._terminal):
            self._print(sentence)
        else:
            self._print(*wrapped(clean(sentence), hang=hang or _HANG, width=width))
        self._record(sentence, None if whole else hang or _HANG)

    def start(self, *, total_steps: int, first_step: int = 0) -> None:
        """Start to show progress, after `first_step` steps of a resumed run."""
        self._total, self._first, self._step = total_steps, first_step, first_step
        if self._enabled and self._terminal:
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=self._bar_format(),
            )

    def step(self, *, epoch: int, epochs: int, step: int, seconds: float) -> None:
        """Advance to step `step` of `epoch`, from 1, which took `seconds`; cheap enough for every step."""
        self._epoch, self._step = f"epoch {epoch}/{epochs}", step
        if step > self._first + 1:  # the first compiles and allocates
            self._seconds.append(seconds)
        if self._bar is not None:
            self._bar.bar_format = self._bar_format()
            with surviving(self._stream):
                self._bar.update(step - self._bar.n)

    def report(self, report: Report) -> None:
        """Show a report in the bar, or else on a line."""
        if not self._enabled:
            return
        self._numbers = report.parts()
        line = f"{self._epoch}, step {self._step}/{self._total}: {', '.join(self._numbers)}"
        if self._bar is not None:
            self._bar.bar_format = self._bar_format()
            with surviving(self._stream):
                self._bar.refresh()
        else:
            self._print(", ".join([line, *self._left()]))
        self._record(line)

    def close(self) -> None:
        """Leave the bar as it is; events may follow."""
        if self._bar is not None:
            with surviving(self._stream):
                self._bar.close()
            self._bar = None

    def _bar_format(self) -> str:
        """Return the line of the bar with as many numbers as the terminal has columns for."""
        fewest, most = _BAR
        start, end = f"{self._epoch} |".lstrip(), f"| {self._step}/{self._total}"
        free = shutil.get_terminal_size().columns - 1 - len(start) - len(end)
        for number in [*self._left(), *self._numbers]:
            if len(number) + 2 > free - fewest:
                break
            end += f", {number}"
            free -= len(number) + 2
        return f"{start}{{bar:{max(1, min(most, free))}}}{end}"

    def _left(self) -> list[str]:
        """Return the training time left, in words; empty before it can be known."""
        steps = self._total - self._step
        if self._step - self._first < _TIMED or not steps:
            return []
        mean = sum(self._seconds) / len(self._seconds)
        return [f"{tqdm.format_interval(mean * steps)} left"]

    def _print(self, *lines: str) -> None:
        above_bar = nullcontext() if self._bar is None else self._bar.external_write_mode(file=self._stream)
        with surviving(self._stream), above_bar:
            say(*lines, stream=self._stream)

    def _record(self, line: str, hang: int | None = None) -> None:
        """Append a line to the file, broken unless `hang` is None: people search and copy whole lines."""
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                stamp = f"{datetime.now():%Y-%m-%d %H:%M:%S} "
                lines = [stamp + clean(line)]
                if hang is not None:
                    lines = wrapped(clean(line), hang=len(stamp) + hang, start=stamp)
                file.write("\n".join([*lines, ""]))
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or error
                self._print(f"{self._path}: events are not recorded ({reason}); training continues")
