"""The console of a run: a progress bar, and a line for every event."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from trainer.networks import NETWORKS
from trainer.output import clean, say, surviving

_WIDE = 116
"""Columns of the whole progress bar; a narrower terminal shows its numbers without the bar."""


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

    def __str__(self) -> str:
        """Return the end of a line."""
        parts = [f"loss {self.loss:.4g}"]
        if self.rates:
            rates = [f"{NETWORKS[network].short} {rate:.2g}" for network, rate in self.rates.items()]
            parts.append(f"lr {' '.join(rates)}")
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:.3g} images/s")
        if self.memory:
            parts.append(f"{self.memory / 2**30:.2f} GiB")
        return ", ".join(parts)

    def compact(self) -> str:
        """Return the same for a terminal of 80 columns, rates in the order of the networks."""
        rates = "/".join(f"{rate:.2g}" for rate in self.rates.values())
        speed = "" if self.images_per_second is None else f" {self.images_per_second:.3g}/s"
        memory = f" {self.memory / 2**30:.1f}G" if self.memory else ""
        return f"loss {self.loss:.4g}" + (f" lr {rates}" if rates else "") + speed + memory


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
        self._started = 0.0
        self._wide = True
        self._epoch = ""

    def record_to(self, path: Path) -> None:
        """Append all later lines to `path` too."""
        self._path = path

    def event(self, sentence: str) -> None:
        """Print an event on a line of its own."""
        if self._enabled:
            self._print(sentence)
            self._record(sentence)

    def start(self, *, total_steps: int, first_step: int = 0) -> None:
        """Start to show progress.

        Args:
            total_steps: the last optimizer step of the run.
            first_step: earlier optimizer steps of a resumed run.
        """
        self._wide = shutil.get_terminal_size().columns >= _WIDE
        wide = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
        self._total, self._first, self._started = total_steps, first_step, time.monotonic()
        if self._enabled and self._terminal:
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format=wide if self._wide else "{desc} {n_fmt}/{total_fmt} <{remaining}{postfix}",
            )

    def step(self, *, epoch: int, epochs: int, step: int) -> None:
        """Advance to optimizer step `step` of `epoch`, both counted from 1; cheap enough for every step."""
        self._epoch, self._step = f"epoch {epoch}/{epochs}", step
        if self._bar is not None:
            self._bar.set_description_str(self._epoch, refresh=False)
            with surviving(self._stream):
                self._bar.update(step - self._bar.n)

    def report(self, report: Report) -> None:
        """Show a report in the bar, or else on a line."""
        if not self._enabled:
            return
        line = f"{self._epoch}, step {self._step}/{self._total}: {report}"
        if self._bar is not None:
            with surviving(self._stream):
                self._bar.set_postfix_str(str(report) if self._wide else report.compact())
        else:
            self._print(f"{line}, {self._remaining()} left")
        self._record(line)

    def close(self) -> None:
        """Leave the bar as it is; events may follow."""
        if self._bar is not None:
            with surviving(self._stream):
                self._bar.close()
            self._bar = None

    def _remaining(self) -> str:
        if not (done := self._step - self._first):
            return "?"
        elapsed = time.monotonic() - self._started
        return tqdm.format_interval(elapsed / done * (self._total - self._step))

    def _print(self, line: str) -> None:
        above_bar = nullcontext() if self._bar is None else self._bar.external_write_mode(file=self._stream)
        with surviving(self._stream), above_bar:
            say(line, stream=self._stream)

    def _record(self, line: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {clean(line)}\n")
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or error
                self._print(f"{self._path}: events are not recorded ({reason}); training continues")
