"""Signals that ask a run to end: the first is obeyed at the next safe place, a later one at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TOGETHER = 1.0
"""Seconds in which further signals repeat the first: service managers and launchers often send two."""


class Interrupted(BaseException):
    """The run was asked to end by a signal. No `except Exception` holds it up."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        """The exit code that shells report for the signal: 130 for SIGINT (Ctrl-C), 143 for SIGTERM."""
        super().__init__(signal.Signals(number).name)


class StopSignals:
    """Turn SIGINT, SIGTERM and other requests to end into `Interrupted` while the `with` block runs.

    Outside `deferred`, where nothing can be lost (imports, loading, caching), it is raised at once. Inside,
    the first signal is only noted, and `check` raises it at safe places. A signal more than `TOGETHER`
    seconds later ends the process at once: a file being written stays behind under a hidden name, and
    everything else is whole.

    Only the main thread receives signals; anywhere else the block changes nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        """The first signal's number."""
        self.quiet = False
        """True if another rank announces the stop."""
        self._deferred = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Begin to listen."""
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has its reasons
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first signal while the block runs; raise an earlier one."""
        self.check()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only note a first signal while the block runs; raise it afterwards unless inside `deferred`."""
        before, deferred = self.requested, self._deferred
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = deferred
        if not deferred and self.requested != before:
            self.check()

    def ignore(self) -> None:
        """Ignore further signals: the process is about to end."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()

    def check(self) -> None:
        """Raise `Interrupted` if a signal was noted."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.requested is not None:
            if time.monotonic() - self._since < TOGETHER:
                return
            _say("\nStopped at once; the last checkpoint is whole.\n")
            os._exit(128 + number)
        self.requested, self._since = number, time.monotonic()
        name = signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(number)
        if not self.quiet:
            _say(
                f"\n{name}: stopping after this step and saving a checkpoint; "
                "another one, a second later, stops at once, without.\n"
            )


def _numbers() -> list[int]:
    """Return the platform's signals that end a process: Ctrl-C, kill, a closed terminal, Ctrl-Break."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _say(text: str) -> None:
    """Write to standard error unbuffered: a handler may run inside a print, which cannot be entered twice."""
    try:
        os.write(2, text.encode())
    except OSError:
        return  # the terminal is gone, which is no reason not to save
