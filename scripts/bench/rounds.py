"""Interleaved rounds: every contender once a round, medians, ratios within a round, tables and JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Figures = dict[str, float]
"""Figures of one contender in one round, by name."""


class Spread(NamedTuple):
    """Median, lowest and highest ratio over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return all three with three digits."""
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


class Rounds:
    """Figures of every contender in every round."""

    def __init__(self) -> None:
        self.figures: dict[str, list[Figures]] = {}

    def run(self, contenders: Mapping[str, Callable[[], Figures]], rounds: int, *, warm: int = 1) -> None:
        """Measure every contender once a round, after `warm` uncounted rounds."""
        for turn in range(warm + rounds):
            for name, measure in contenders.items():
                found = measure()
                if turn >= warm:
                    self.add(name, found)

    def add(self, name: str, figures: Figures) -> None:
        """Add a contender's figures of one round."""
        self.figures.setdefault(name, []).append(figures)

    def median(self, name: str, key: str) -> float:
        """Return a figure's median over the rounds."""
        return statistics.median(figures[key] for figures in self.figures[name])

    def ratio(self, name: str, base: str, key: str) -> Spread:
        """Return the ratios to another contender, each taken within a round."""
        pairs = zip(self.figures[name], self.figures[base], strict=True)
        ratios = [own[key] / its[key] for own, its in pairs]
        return Spread(statistics.median(ratios), min(ratios), max(ratios))


def parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a benchmark's parser, with the options that all have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"counted rounds ({rounds})")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every figure of every round")
    return made


def write_json(path: Path | None, machine: str, found: Mapping[str, Rounds]) -> None:
    """Write the machine and the figures of every set of rounds; nothing without a path."""
    if path is not None:
        document = {"machine": machine, **{title: rounds.figures for title, rounds in found.items()}}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text, its first column left-aligned and the others right-aligned."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def timed(run: Callable[[], object], device: str = "cpu") -> Figures:
    """Return the seconds of a call: `wall`, and `host`, the process's CPU time or on a GPU until launched."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    run()
    host = time.process_time() - busy
    if device != "cpu":
        host = time.perf_counter() - start
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - start, "host": host}
