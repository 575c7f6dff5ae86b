"""The same prompts with the base and with every last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scripts.compare.drift import tone
from scripts.compare.measures import Compared
from scripts.compare.report import Drawn

if TYPE_CHECKING:
    from PIL import Image

    from trainer.sampling import SamplePrompts


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
        shown: the prompts of the grid, which has a column for the first run of each file that came to its end.
        unrelated: the prompts whose drift is measured, with every run.
        words: which prompts those are.
        base: the model that all runs began from.
        resolution: the training's.
        say: is told of each model.
    """
    from scripts.grids.columns import Column, checkpoint_column
    from scripts.grids.draw import draw

    runs = [(place, run) for place, file in enumerate(files) for run in file.runs if run.checkpoint is not None and not run.end.code]
    if not runs:
        return list(files), None
    columns = [Column("base", base)]
    columns += [checkpoint_column(run.checkpoint, base, files[place].label) for place, run in runs if run.checkpoint is not None]
    # One guidance scale: the first of the file, which is how people use the model.
    firsts = [
        next(number for number, (owner, _) in enumerate(runs) if owner == place) for place in dict.fromkeys(place for place, _ in runs)
    ]
    grid = draw(
        [columns[0], *(columns[1 + number] for number in firsts)],
        shown,
        cfgs=shown.cfgs[:1],
        resolution=shown.resolution or resolution,
        say=say,
    )
    if unrelated == shown:
        have = {0: 0, **{1 + number: place for place, number in enumerate(firsts, start=1)}}
        more = [number for number in range(len(columns)) if number not in have]
    else:
        have, more = {}, list(range(len(columns)))
    pictures: dict[int, list[Image.Image]] = {}
    if more:
        others = draw(
            [columns[number] for number in more], unrelated, cfgs=unrelated.cfgs[:1], resolution=unrelated.resolution or resolution, say=say
        )
        pictures |= {number: _of_column(others.cells, place) for place, number in enumerate(more)}
    pictures |= {number: _of_column(grid.cells, place) for number, place in have.items()}
    tones = {number: tone(drawn) for number, drawn in pictures.items() if drawn}
    with_tones = [
        replace(file, tones=tuple(tones[1 + number] for number, (owner, _) in enumerate(runs) if owner == place and 1 + number in tones))
        for place, file in enumerate(files)
    ]
    return with_tones, Drawn(grid, tones[0], words) if 0 in tones else None


def _of_column(cells: object, place: int) -> list[Image.Image]:
    assert isinstance(cells, dict)
    return [picture for cell, picture in cells.items() if cell[0] == place and not isinstance(picture, str)]
