"""The same prompts with the base and with every last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scripts.compare.drift import Tone, tone
from scripts.compare.measures import Compared
from scripts.compare.report import Drawn

if TYPE_CHECKING:
    from PIL import Image

    from scripts.grids.draw import Cell, Grid
    from trainer.evaluation.options import SamplePrompts


def draw_pictures(
    files: Sequence[Compared],
    shown: SamplePrompts,
    unrelated: SamplePrompts,
    words: str,
    *,
    base: str,
    resolution: int,
    say: Callable[[str], None],
) -> tuple[list[Compared], Drawn | None]:
    """Draw with all checkpoints; return the files with the tones of their pictures, and the rest.

    Args:
        files: what is compared.
        shown: the prompts of the grid, which has a column for the first run of each file that came to its
        end.
        unrelated: the prompts whose drift is measured, with every run.
        words: which prompts those are.
        base: the model that all runs began from.
        resolution: the training's.
        say: is told of each model.
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
        # One guidance scale: the first of the file, which is how people use the model.
        return draw(
            these, prompts, cfgs=prompts.cfgs[:1], resolution=prompts.resolution or resolution, say=say
        )

    everything = drawn(columns, unrelated)
    grid = (
        everything.only(firsts)
        if unrelated == shown
        else drawn([columns[number] for number in firsts], shown)
    )
    tones: dict[int, list[Tone]] = {}
    for number, owner in enumerate(owners):
        if pictures := _of_column(everything.cells, number):
            tones.setdefault(owner, []).append(tone(pictures))
    with_tones = [replace(file, tones=tuple(tones.get(place, ()))) for place, file in enumerate(files)]
    return with_tones, Drawn(grid, tones[-1][0], words) if -1 in tones else None


def _of_column(cells: Mapping[Cell, Image.Image | str], place: int) -> list[Image.Image]:
    return [picture for cell, picture in cells.items() if cell[0] == place and not isinstance(picture, str)]
