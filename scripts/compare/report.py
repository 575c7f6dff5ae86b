"""The comparison as a page, and the same in Markdown."""

from __future__ import annotations

import platform
import shlex
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.atomic import appearing
from scripts.compare.measures import FIXED, RATE, VALIDATION, Compared, D, Measured, networks_of
from scripts.compare.plots import colour, draw_plots

if TYPE_CHECKING:
    from scripts.compare.drift import Tone
    from scripts.grids.draw import Grid

PAGE, TEXT, GRID = "report.html", "report.md", "grid.png"


class Cell(NamedTuple):
    """A number of a table, and the smaller line under it."""

    text: str
    under: str = ""


class Row(NamedTuple):
    """A line of a table: one file."""

    label: str
    ink: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    """A table with a line for each file, and what has to be known to read it."""

    title: str
    words: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


class Drawn(NamedTuple):
    """What the pictures of a comparison were made with."""

    grid: Grid
    """The base and the last checkpoint of every file, first seed."""

    base: Tone
    """Of the unrelated prompts before training."""

    unrelated: str
    """Which prompts those are, in words."""


def write_report(
    files: Sequence[Compared], drawn: Drawn | None, out: Path, *, settings: str, command: str, device: str
) -> Path:
    """Write the page, the Markdown file and their pictures into `out`/report, and return the page.

    Args:
        files: what is compared, the first being what the others are measured by.
        drawn: pictures; None where no run has left a checkpoint.
        out: the comparison's folder.
        settings: what all runs have in common, in words.
        command: the command line that makes the comparison again.
        device: what it was trained on.
    """
    from scripts.grids.draw import page_body, picture_of
    from scripts.web_page import document, inlined

    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(files, folder)
    tables = [
        _losses(files),
        _cost(files),
        *([_drift(files, drawn)] if drawn is not None else []),
        _ends(files),
    ]
    seeds = sorted({run.end.planned.seed for file in files for run in file.runs})
    head = [
        f"{len(files)} optimizer files, {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, seeds))}; the same data, order, noise "
        f"and timesteps for each file. {settings}.",
        f"Trained on: {device}.",
    ]
    if len(seeds) > 1:
        head.append("Numbers are means over the seeds, with the lowest and the highest.")
    if any(run.end.parts > 1 for file in files for run in file.runs):
        head.append("Of runs that were broken off and went on later, the memory of the process is not known.")
    failed = [f"{file.label}: {sentence}" for file in files for sentence in file.failed]
    board = f"tensorboard --logdir {shlex.quote(str(out / 'runs'))}"
    board_words = (
        "shows all runs side by side, one line each: tick them on the left. The tab Custom Scalars has the "
        "losses, rates and d of a run "
        "in one place."
    )

    if drawn is not None:
        with appearing(folder / GRID) as draft:
            picture_of(drawn.grid, "base and last checkpoints").save(draft, "PNG")
    # The page.
    parts = [f"<p>{escape(sentence)}</p>" for sentence in head]
    parts += [f"<p><b>Failed: {escape(sentence)}</b></p>" for sentence in failed]
    for table in tables:
        parts.append(f"<h2>{escape(table.title)}</h2>{_html(table)}<p class='note'>{escape(table.words)}</p>")
    for plot in plots:
        image = inlined((folder / f"{plot.name}.png").read_bytes(), "png")
        parts.append(
            f'<h2>{escape(plot.title)}</h2><img class="plot" src="{image}" alt="{escape(plot.title)}">'
        )
        parts.append(f'<p class="note">{escape(plot.words)}</p>')
    if drawn is not None:
        parts.append("<h2>Pictures</h2>" + page_body(drawn.grid))
    parts.append(f"<h2>In TensorBoard</h2><pre>{escape(board)}</pre><p>{escape(board_words)}</p>")
    parts.append(f"<h2>Made with</h2><pre>{escape(command)}</pre>")
    with appearing(folder / PAGE) as draft:
        draft.write_text(document("Optimizers compared", "\n".join(parts)), encoding="utf-8")
    # The same in Markdown.
    lines = ["# Optimizers compared", "", *head, *(f"**Failed: {sentence}**" for sentence in failed), ""]
    for table in tables:
        lines += [f"## {table.title}", "", *_markdown(table), "", table.words, ""]
    for plot in plots:
        lines += [f"## {plot.title}", "", f"![{plot.title}]({plot.name}.png)", "", plot.words, ""]
    if drawn is not None:
        lines += [
            "## Pictures",
            "",
            f"{drawn.grid.settings}.",
            "",
            f"![base and last checkpoints]({GRID})",
            "",
        ]
    lines += ["## In TensorBoard", "", f"`{board}` {board_words}", "", "## Made with", "", f"`{command}`", ""]
    with appearing(folder / TEXT) as draft:
        draft.write_text("\n".join(lines), encoding="utf-8")
    return folder / PAGE


def device_words() -> str:
    """Return this machine's device in words: the GPU, or the processor and threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} thread(s)), torch {torch.__version__}"


def _losses(files: Sequence[Compared]) -> Table:
    has_validation = any(run.curves.get(VALIDATION) for file in files for run in file.runs)
    tags = [("fixed-noise", FIXED), *([("validation", VALIDATION)] if has_validation else [])]
    heads, of = [], []
    for words, tag in tags:
        heads += [f"{words} loss, final", "to the first", "lowest", "to the first"]
        of += [lambda run, tag=tag: run.final(tag), lambda run, tag=tag: run.best(tag)]
    rows = []
    for number, file in enumerate(files):
        cells: list[Cell] = []
        for measure in of:
            cells += [_cell(file.over_seeds(measure), ".4f"), _ratio(file, files[0], measure)]
        rows.append(Row(file.label, colour(number), tuple(cells)))
    words = (
        "Lowest: of the measurements after the first step. To the first: "
        "the mean divided by the first file's. A lower fixed-noise loss "
        "is a closer fit to the training images"
    )
    words += (
        "; the validation loss, of images that are not trained, rises where a model learns them by heart."
        if has_validation
        else "."
    )
    return Table("Loss", words, tuple(heads), tuple(rows))


def _cost(files: Sequence[Compared]) -> Table:
    of: list[tuple[str, str, Callable[[Measured], float | None]]] = [
        ("minutes an epoch", ".3g", lambda run: run.minutes),
        ("images/s", ".3g", lambda run: run.images),
        ("peak memory, GiB", ".2f", lambda run: run.memory),
        ("state, bytes a parameter", ".2f", lambda run: run.state),
        ("checkpoint, MiB", ".1f", lambda run: run.size),
    ]
    rows = [
        Row(
            file.label,
            colour(number),
            tuple(_cell(file.over_seeds(measure), form) for _, form, measure in of),
        )
        for number, file in enumerate(files)
    ]
    words = (
        "Medians of a run, samples and validation left out. What else the machine was doing shows in the "
        "times. Memory is the most that "
        "tensors held on CUDA, and the most that the whole process held on a CPU. Bytes are of optimizer "
        "state for each parameter that "
        "learns. The checkpoint is without what resuming needs."
    )
    return Table("Cost", words, tuple(head for head, _, _ in of), tuple(rows))


def _drift(files: Sequence[Compared], drawn: Drawn) -> Table:
    rows = [
        Row(
            "base",
            "#1d2430",
            (
                Cell(f"{drawn.base.saturation:.3f}"),
                Cell("0%"),
                Cell(f"{drawn.base.contrast:.3f}"),
                Cell("0%"),
            ),
        )
    ]
    for number, file in enumerate(files):
        cells = []
        for values, base in (
            ([each.saturation for each in file.tones], drawn.base.saturation),
            ([each.contrast for each in file.tones], drawn.base.contrast),
        ):
            cells += [
                _cell(values, ".3f"),
                _cell([100 * (value / base - 1) if base else 0.0 for value in values], "+.0f", "%"),
            ]
        rows.append(Row(file.label, colour(number), tuple(cells)))
    words = (
        f"Pictures of {drawn.unrelated}, from the same noise with the base and with each last checkpoint. "
        "Saturation: largest less "
        "smallest channel, mean over pixels, 0 to 1. Contrast: standard deviation of a picture's luma, "
        "mean over pictures. A model that "
        "was trained too hard tends to show in both before it shows in the loss."
    )
    return Table(
        "Drift of unrelated prompts",
        words,
        ("saturation", "to the base", "contrast", "to the base"),
        tuple(rows),
    )


def _ends(files: Sequence[Compared]) -> Table:
    networks = networks_of(files, RATE)
    tags = [(f"rate at the end, {network}", RATE + network) for network in networks]
    tags += [(f"d at the end, {network}", D + network) for network in networks_of(files, D)]
    rows = [
        Row(
            file.label,
            colour(number),
            tuple(_cell(file.over_seeds(lambda run, tag=tag: run.final(tag)), ".2e") for _, tag in tags),
        )
        for number, file in enumerate(files)
    ]
    return Table(
        "Rates",
        "For D-Adaptation the rate is lr times d, and the schedule.",
        tuple(head for head, _ in tags),
        tuple(rows),
    )


def _cell(values: Sequence[float], form: str, unit: str = "") -> Cell:
    if not values:
        return Cell("–")
    under = f"{min(values):{form}} to {max(values):{form}}" if len(values) > 1 else ""
    return Cell(f"{statistics.fmean(values):{form}}{unit}", under)


def _ratio(file: Compared, first: Compared, of: Callable[[Measured], float | None]) -> Cell:
    ours, theirs = file.over_seeds(of), first.over_seeds(of)
    return (
        Cell(f"{statistics.fmean(ours) / statistics.fmean(theirs):.3f}")
        if ours and theirs and statistics.fmean(theirs)
        else Cell("–")
    )


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("", *table.heads))
    body = ""
    for row in table.rows:
        cells = "".join(
            f"<td>{escape(cell.text)}"
            + (f'<span class="under">{escape(cell.under)}</span>' if cell.under else "")
            + "</td>"
            for cell in row.cells
        )
        body += f'<tr><td><span class="swatch" style="border-color:{row.ink}"></span>{escape(row.label)}</td>{cells}</tr>'
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _markdown(table: Table) -> list[str]:
    lines = ["| " + " | ".join(("", *table.heads)) + " |", "|" + "---|" * (len(table.heads) + 1)]
    for row in table.rows:
        cells = [cell.text + (f" ({cell.under})" if cell.under else "") for cell in row.cells]
        lines.append("| " + " | ".join([row.label.replace("|", "\\|"), *cells]) + " |")
    return lines
