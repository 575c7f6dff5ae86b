"""The measurements between two reports, kept on the device until a report is due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from trainer.reporting.tags import DATA_WAIT, IMAGES_PER_SECOND, MINUTES_PER_EPOCH
from trainer.state_file import as_kind


class Meter:
    """Collect measurements; only `read`, `read_epoch` and `state_dict` wait for the device, once each.

    Means skip non-finite values, so that one skipped step does not hide the others; without a finite value
    they are NaN. Sums are float64.

    Args:
        epoch_tags: for tags that are also averaged over the epoch, the tag of that mean.
        clock: returns seconds.
    """

    def __init__(
        self, *, epoch_tags: Mapping[str, str], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._epoch_tags = dict(epoch_tags)
        self._clock = clock
        self._window: dict[str, tuple[Any, Any]] = {}
        self._epoch: dict[str, tuple[Any, Any]] = {}
        self._totals: dict[str, Any] = {}
        self._epoch_seconds = 0.0
        self._start_window()
        self._epoch_since = self._since

    def add(
        self, means: Mapping[str, Tensor], *, images: int, totals: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add one optimizer step.

        Args:
            means: 0-d tensors by tag, averaged over the steps with the images as weights.
            images: the images of the step on all ranks.
            totals: 0-d tensors by tag, summed since the start of the run.
        """
        self._steps += 1
        self._images += images
        for tag, value in means.items():
            finite = torch.isfinite(value)
            weighted = torch.where(finite, value, 0.0).double() * images
            weight = finite.double() * images
            _accumulate(self._window, tag, weighted, weight)
            if tag in self._epoch_tags:
                _accumulate(self._epoch, self._epoch_tags[tag], weighted, weight)
        for tag, value in (totals or {}).items():
            self._totals[tag] = self._totals.get(tag, 0.0) + value.double()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        before = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside (samples, checkpoints, evaluations) from the images per second."""
        before = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - before

    def read(self, latest: Mapping[str, Tensor | float] | None = None) -> dict[str, float]:
        """Return the means since the last read, the totals and the speed, and `latest` as it is."""
        singles = {**self._totals, **(latest or {})}
        *pairs, last = _numbers([*self._window.values(), tuple(singles.values())])
        numbers = {tag: _mean(pair) for tag, pair in zip(self._window, pairs, strict=True)}
        numbers |= zip(singles, last, strict=True)
        if self._steps:  # after the transfer, when the device has finished the steps
            seconds = self._clock() - self._since - self._paused
            numbers[IMAGES_PER_SECOND] = self._images / seconds if seconds > 0 else 0.0
            numbers[DATA_WAIT] = self._waited / self._steps
        self._window = {}
        self._start_window()
        return numbers

    def read_epoch(self) -> dict[str, float]:
        """Return the epoch's means and its minutes of wall time, and start the next epoch."""
        sums = _numbers([*self._epoch.values()])
        numbers = {tag: _mean(pair) for tag, pair in zip(self._epoch, sums, strict=True)}
        now = self._clock()
        numbers[MINUTES_PER_EPOCH] = (self._epoch_seconds + now - self._epoch_since) / 60
        self._epoch, self._epoch_seconds, self._epoch_since = {}, 0.0, now
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, so that a resumed run reports the numbers of an uninterrupted one."""
        sums = [*self._window.values(), *self._epoch.values()]
        *pairs, totals = _numbers([*sums, tuple(self._totals.values())])
        return {
            "window": dict(zip(self._window, pairs[: len(self._window)], strict=True)),
            "epoch": dict(zip(self._epoch, pairs[len(self._window) :], strict=True)),
            "totals": dict(zip(self._totals, totals, strict=True)),
            "epoch_seconds": self._epoch_seconds + self._clock() - self._epoch_since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self._window = as_kind(dict[str, tuple[float, float]], state["window"])
        self._epoch = as_kind(dict[str, tuple[float, float]], state["epoch"])
        self._totals = as_kind(dict[str, float], state["totals"])
        self._epoch_seconds = as_kind(float, state["epoch_seconds"])
        self._start_window()
        self._epoch_since = self._since

    def _start_window(self) -> None:
        self._since = self._clock()
        self._steps = self._images = 0
        self._waited = self._paused = 0.0


def memory_in_use(device: torch.device) -> int:
    """Return bytes: on CUDA the peak memory of tensors, elsewhere the memory of the process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _accumulate(sums: dict[str, tuple[Any, Any]], tag: str, weighted: Tensor, weight: Tensor) -> None:
    total, weights = sums.get(tag, (0.0, 0.0))
    sums[tag] = (total + weighted, weights + weight)


def _mean(sums: Sequence[float]) -> float:
    total, weight = sums
    return total / weight if weight else math.nan


def _numbers(rows: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Return rows of tensors and numbers as floats, with one transfer per device."""
    numbers = [[0.0] * len(row) for row in rows]
    tensors: dict[torch.device, list[tuple[int, int]]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if isinstance(value, Tensor):
                tensors.setdefault(value.device, []).append((y, x))
            else:
                numbers[y][x] = float(value)
    for cells in tensors.values():
        read = torch.stack([rows[y][x].detach().double().reshape(()) for y, x in cells]).tolist()
        for (y, x), number in zip(cells, read, strict=True):
            numbers[y][x] = number
    return numbers
