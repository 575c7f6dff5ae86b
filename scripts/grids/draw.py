"""A grid of samples: every combination of models, prompts, seeds, guidance scales and steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.grids.columns import Reading
from trainer.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from scripts.grids.columns import Column
    from trainer.evaluation.options import SamplePrompts

AXES = ("checkpoints", "prompts", "seeds", "cfgs", "steps")

_PLAIN = Reading()

Cell = tuple[int, int, int, int, int]
"""An index on each axis, in their order."""


@dataclass(frozen=True)
class Grid:
    """Samples and the values along each axis; a sample that failed is replaced by the reason."""

    values: Mapping[str, Sequence[str]]
    """Labels along each axis."""

    cells: Mapping[Cell, Image.Image | str]
    x: str
    y: str
    settings: str
    """The settings that all samples share, in words."""

    def panels(self) -> Iterator[tuple[str, list[tuple[str, list[Image.Image | str]]]]]:
        """Yield a panel for every combination of the other axes: words, then rows of label and samples."""
        others = [axis for axis in AXES if axis not in (self.x, self.y)]
        for places in itertools.product(*(range(len(self.values[axis])) for axis in others)):
            at = dict(zip(others, places, strict=True))
            words = [
                f"{_ONE[axis]} {self.values[axis][place]}"
                for axis, place in at.items()
                if len(self.values[axis]) > 1
            ]
            rows = []
            for row, label in enumerate(self.values[self.y]):
                keys = ({**at, self.x: column, self.y: row} for column in range(len(self.values[self.x])))
                rows.append((self._label(self.y, label), [self.cells[_cell(key)] for key in keys]))
            yield ", ".join(words), rows

    def only(self, axis: str, indices: Sequence[int]) -> Grid:
        """Return the grid of some values of an axis."""
        number = AXES.index(axis)
        places = {old: new for new, old in enumerate(indices)}
        cells: dict[Cell, Image.Image | str] = {}
        for cell, picture in self.cells.items():
            if cell[number] in places:
                key = dict(zip(AXES, cell, strict=True)) | {axis: places[cell[number]]}
                cells[_cell(key)] = picture
        labels = [self.values[axis][index] for index in indices]
        return replace(self, values={**self.values, axis: labels}, cells=cells)

    @property
    def columns(self) -> list[str]:
        """The labels above the columns."""
        return [self._label(self.x, value) for value in self.values[self.x]]

    def _label(self, axis: str, value: str) -> str:
        return value if axis in ("checkpoints", "prompts") else f"{_ONE[axis]} {value}"


_ONE = {"checkpoints": "checkpoint", "prompts": "prompt", "seeds": "seed", "cfgs": "cfg", "steps": "steps"}


def read_prompts(named: Sequence[str]) -> SamplePrompts:
    """Return the prompts of one file, or the named prompts.

    Raises:
        UserError: the file is missing, has mistakes, or asks for captions of the data.
    """
    from trainer.config.sample_file import load_sample_prompts
    from trainer.evaluation.options import SamplePrompt, SamplePrompts

    if len(named) == 1 and named[0].lower().endswith((".json", ".txt")):
        prompts = load_sample_prompts(Path(named[0]))
        if not prompts.samples or any(prompt.random_caption for prompt in prompts.samples):
            raise UserError(
                f"--prompts: {named[0]} asks for captions of the data, which a grid does not read; "
                "name prompts."
            )
        return prompts
    return SamplePrompts(samples=tuple(SamplePrompt(prompt=text) for text in named), cfgs=(7.0,))


def draw(
    columns: Sequence[Column],
    prompts: SamplePrompts,
    *,
    reading: Reading = _PLAIN,
    seeds: Sequence[int] | None = None,
    cfgs: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    resolution: int | None = None,
    x: str = "checkpoints",
    y: str = "prompts",
    batch_size: int = 4,
    say: Callable[[str], None] = lambda _: None,
) -> Grid:
    """Draw every sample of a grid; one model is in memory at a time.

    Args:
        columns: the models.
        prompts: the prompts, and the settings that are not given here.
        reading: how the text encoder reads them.
        seeds: for every prompt; None takes each prompt's own, the file's or 0.
        cfgs: guidance scales; None takes the file's.
        steps: of the sampler; None takes the file's.
        resolution: the side of a square sample; None takes the file's, or the first model's own.
        x: the axis along a row.
        y: the axis down a column; combinations of the other three are panels of their own.
        batch_size: samples that are drawn together.
        say: takes a line for each model.

    Raises:
        UserError: a model cannot be read, or the axes are the same.
    """
    if x == y:
        raise UserError(f"--x and --y: both are {x}; name two of {', '.join(AXES)}.")
    prompts = _chosen(prompts, reading.wildcard_seed)
    used_cfgs, used_steps = tuple(cfgs or prompts.cfgs), tuple(steps or (prompts.num_inference_steps,))
    asked = replace(
        prompts, cfgs=used_cfgs, resolution=resolution or prompts.resolution, batch_size=batch_size
    )
    cells = _cells(columns, asked, reading, seeds, used_steps, say)
    values = {
        "checkpoints": [column.label for column in columns],
        "prompts": [prompt.prompt for prompt in prompts.samples or ()],
        "seeds": [str(seed) for seed in seeds] if seeds else ["of each prompt"],
        "cfgs": [f"{cfg:g}" for cfg in used_cfgs],
        "steps": [str(count) for count in used_steps],
    }
    words = [prompts.scheduler, *reading.words()]
    words += [f"{values['steps'][0]} steps"] * (len(used_steps) == 1)
    words += [f"cfg {values['cfgs'][0]}"] * (len(used_cfgs) == 1)
    words += [f"seed {values['seeds'][0]}"] * (len(values["seeds"]) == 1)
    return Grid(values, cells, x, y, ", ".join(words))


def _chosen(prompts: SamplePrompts, seed: int | None) -> SamplePrompts:
    """Return the prompts with one alternative of each wildcard, as the samples of a run of that seed have."""
    from trainer.evaluation.sampling import with_choices

    if seed is None:
        return prompts
    texts = [with_choices(each.prompt, seed, number) for number, each in enumerate(prompts.samples or ())]
    samples = [replace(each, prompt=text) for each, text in zip(prompts.samples or (), texts, strict=True)]
    return replace(prompts, samples=tuple(samples))


def _cells(
    columns: Sequence[Column],
    asked: SamplePrompts,
    reading: Reading,
    seeds: Sequence[int] | None,
    steps: Sequence[int],
    say: Callable[[str], None],
) -> dict[Cell, Image.Image | str]:
    """Return the samples of every model, which is loaded once and freed before the next."""
    import torch

    from scripts.grids.columns import load
    from trainer.evaluation.sampling import Sampler
    from trainer.models.quiet import quiet_libraries
    from trainer.training.launch import expected
    from trainer.training.options import PrecisionOptions
    from trainer.training.precision import resolve_precision

    quiet_libraries()
    precision = resolve_precision(PrecisionOptions(), expected(gpuid=0).device)
    samples, resolution = asked.samples or (), asked.resolution
    cells: dict[Cell, Image.Image | str] = {}
    for number, column in enumerate(columns):
        say(f"{column.label}: {column.name}")
        models = load(column)
        for network in (models.unet, models.text_encoder, models.vae):
            torch.nn.Module.to(network.requires_grad_(False).eval(), precision.device)
        if resolution is None:
            unet, vae = models.unet.config, models.vae.config
            resolution = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
        for (s, seed), (t, count) in itertools.product(enumerate(seeds or (None,)), enumerate(steps)):
            these = samples if seed is None else tuple(replace(prompt, seed=seed) for prompt in samples)
            part = replace(asked, samples=these, num_inference_steps=count, resolution=resolution)
            sampler = Sampler(
                part,
                resolution=resolution,
                seed=0,
                batch_size=asked.batch_size or 1,
                clip_skip=reading.clip_skip,
                chunks=reading.max_tokens // 75,
            )
            drawn = sampler.images(models, device=precision.device, autocast=precision.autocast)
            for (place, cfg), picture in drawn.items():
                cells[number, place, s, asked.cfgs.index(cfg), t] = picture
        del models
    return cells


def picture_of(grid: Grid, title: str) -> Image.Image:
    """Return the grid as one picture; small samples are enlarged by a whole factor."""
    from trainer.evaluation.image_grid import labelled_row, tiled

    panels = []
    for words, rows in grid.panels():
        pictures = [labelled_row(_same_size(row), grid.columns, label) for label, row in rows]
        panels.append((words, pictures))
    stacked = [tiled(pictures, columns=1, title=words) for words, pictures in panels]
    return tiled(panels[0][1] if len(panels) == 1 else stacked, columns=1, title=f"{title} ({grid.settings})")


def page_body(grid: Grid) -> str:
    """Return the grid as HTML, with the samples inside as JPEG."""
    import io
    from html import escape

    from scripts.web_page import inlined

    note = f"{escape(grid.settings)}. Samples in this page are JPEG; the PNG beside it is exact."
    parts = [f'<p class="note">{note}</p>']
    for words, rows in grid.panels():
        parts.append(f"<h2>{escape(words)}</h2>" if words else "")
        head = "".join(f"<th>{escape(label)}</th>" for label in grid.columns)
        parts.append(f'<div class="wide"><table class="grid"><tr><th></th>{head}</tr>')
        for label, row in rows:
            cells = []
            for picture in row:
                if isinstance(picture, str):
                    cells.append(f'<td class="missing">{escape(picture)}</td>')
                    continue
                content = io.BytesIO()
                picture.convert("RGB").save(content, "JPEG", quality=92)
                side = picture.width * max(1, -(-160 // min(picture.size)))
                source, name = inlined(content.getvalue(), "jpeg"), escape(label, quote=True)
                cells.append(f'<td><img src="{source}" width="{side}" alt="{name}"></td>')
            parts.append(f'<tr><td class="side">{escape(label)}</td>{"".join(cells)}</tr>')
        parts.append("</table></div>")
    return "\n".join(parts)


def _same_size(pictures: Sequence[Image.Image | str]) -> list[Image.Image | str]:
    """Return samples of one size: smaller ones are centred on white."""
    from PIL import Image

    sizes = {picture.size for picture in pictures if not isinstance(picture, str)}
    if len(sizes) < 2:
        return list(pictures)
    width, height = (max(size[side] for size in sizes) for side in (0, 1))
    placed: list[Image.Image | str] = []
    for picture in pictures:
        if isinstance(picture, str):
            placed.append(picture)
            continue
        sheet = Image.new("RGB", (width, height), "white")
        sheet.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        placed.append(sheet)
    return placed


def _cell(places: Mapping[str, int]) -> Cell:
    checkpoint, prompt, seed, cfg, steps = (places[axis] for axis in AXES)
    return checkpoint, prompt, seed, cfg, steps
