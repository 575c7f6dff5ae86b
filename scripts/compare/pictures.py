"""Samples of the base and of every last checkpoint, for the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from scripts.compare.drift import Shift, Tone, shift, tone
from scripts.compare.measures import Compared

if TYPE_CHECKING:
    from PIL import Image

    from scripts.grids.columns import Reading
    from scripts.grids.draw import Cell, Grid
    from trainer.evaluation.options import SamplePrompts


class Drawn(NamedTuple):
    """The samples of a comparison."""

    grid: Grid
    """The base and the last checkpoint of every file, first seed."""

    base: Tone
    """Of the unrelated prompts before training."""

    unrelated: str
    """The unrelated prompts, in words."""

    prompts: Sequence[str]
    """The unrelated prompts."""

    moved: Grid
    """Samples of those that moved most, with the columns of `grid`."""


def draw_pictures(
    files: Sequence[Compared],
    shown: SamplePrompts,
    unrelated: SamplePrompts,
    words: str,
    *,
    base: str,
    resolution: int,
    reading: Reading,
    say: Callable[[str], None],
) -> tuple[list[Compared], Drawn | None]:
    """Draw samples with all checkpoints; return the files with their tones, and the grid.

    Args:
        files: the files.
        shown: the prompts of the grid, with a column for each file's first finished run.
        unrelated: the prompts whose drift is measured, with every run.
        words: `unrelated` in words.
        base: the model that all runs started from.
        resolution: the training's.
        reading: the training's reading of prompts.
        say: takes a line for each model.
    """
    from scripts.grids.columns import Column, checkpoint_column
    from scripts.grids.draw import draw

    runs = [
        (place, run)
        for place, file in enumerate(files)
        for run in file.runs
        if run.checkpoint is not None and not run.end.code
    ]
    if not runs:
        return list(files), None
    columns = [Column("base", base)]
    columns += [
        checkpoint_column(run.checkpoint, base, files[place].label)
        for place, run in runs
        if run.checkpoint is not None
    ]
    owners = [-1, *(place for place, _ in runs)]
    firsts = [owners.index(owner) for owner in dict.fromkeys(owners)]

    def drawn(these: Sequence[Column], prompts: SamplePrompts) -> Grid:
        # The file's first guidance scale alone: people use the model with one.
        size, cfgs = prompts.resolution or resolution, prompts.cfgs[:1]
        return draw(these, prompts, reading=reading, cfgs=cfgs, resolution=size, say=say)

    everything = drawn(columns, unrelated)
    grid = (
        everything.only("checkpoints", firsts)
        if unrelated == shown
        else drawn([columns[number] for number in firsts], shown)
    )
    measured, before = _measured(files, everything, owners)
    if before is None:
        return measured, None
    worst = sorted({prompt for file in measured for prompt, _ in moved_most(file)})
    shown_worst = everything.only("checkpoints", firsts).only("prompts", worst)
    return measured, Drawn(grid, before, words, everything.values["prompts"], shown_worst)


def _measured(
    files: Sequence[Compared], everything: Grid, owners: Sequence[int]
) -> tuple[list[Compared], Tone | None]:
    """Return the files with the drift of their runs, and the base's tone, None if none of it was drawn.

    Args:
        files: the files.
        everything: the unrelated prompts with all models.
        owners: by column the index of its file; -1 for the base.
    """
    tones: dict[int, list[Tone]] = {}
    shifts: dict[int, list[tuple[tuple[int, Shift], ...]]] = {}
    for number, owner in enumerate(owners):
        if pictures := _of_column(everything.cells, number):
            tones.setdefault(owner, []).append(tone(pictures))
            shifts.setdefault(owner, []).append(_shifts(everything.cells, number))
    measured = [
        replace(file, tones=tuple(tones.get(place, ())), shifts=tuple(shifts.get(place, ())))
        for place, file in enumerate(files)
    ]
    return measured, tones[-1][0] if -1 in tones else None


def moved_most(file: Compared, count: int = 3) -> list[tuple[int, Shift]]:
    """Return the indices of the prompts that a file's first run moved most, farthest first.

    Colour and structure count alike: each in shares of its mean over the prompts.
    """
    shifts = dict(file.shifts[0]) if file.shifts else {}
    means = [fmean(values) or 1.0 for values in zip(*shifts.values(), strict=True)]

    def far(prompt: int) -> float:
        return sum(value / mean for value, mean in zip(shifts[prompt], means, strict=True))

    return [(prompt, shifts[prompt]) for prompt in sorted(shifts, key=far, reverse=True)[:count]]


def _shifts(cells: Mapping[Cell, Image.Image | str], column: int) -> tuple[tuple[int, Shift], ...]:
    """Return the distance of each prompt's sample to the base's, in column 0."""
    found = []
    for cell, sample in cells.items():
        base = cells.get((0, *cell[1:]))
        if cell[0] == column and not isinstance(sample, str) and not isinstance(base, str | None):
            found.append((cell[1], shift(sample, base)))
    return tuple(found)


def _of_column(cells: Mapping[Cell, Image.Image | str], place: int) -> list[Image.Image]:
    return [picture for cell, picture in cells.items() if cell[0] == place and not isinstance(picture, str)]
