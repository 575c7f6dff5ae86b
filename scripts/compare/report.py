"""The comparison's report: one list of sections, written as a web page and as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from data.atomic import appearing
from scripts.compare.measures import Compared
from scripts.compare.plots import draw_plots
from scripts.compare.tables import MOVED, Table, tables, verdict

if TYPE_CHECKING:
    from scripts.compare.pictures import Drawn
    from scripts.grids.draw import Grid

PAGE, TEXT, GRID, MOVED_GRID = "report.html", "report.md", "grid.png", "moved.png"
TITLE = "Optimizers compared"


@dataclass(frozen=True)
class Section:
    """A heading, one figure and the words below it."""

    title: str
    words: str = ""
    table: Table | None = None
    plots: tuple[str, ...] = ()
    """Names of pictures in the report's folder."""
    grid: Grid | None = None
    """Samples."""
    picture: str = ""
    """Name of the picture of `grid` in the report's folder."""
    command: str = ""


def write_report(
    files: Sequence[Compared], drawn: Drawn | None, out: Path, *, settings: str, command: str
) -> Path:
    """Write the page, the Markdown file and their pictures into `out`/report, and return the page.

    Args:
        files: the files; the others are measured by the first.
        drawn: None if no run has left a checkpoint.
        out: the comparison's folder.
        settings: the settings that all runs share, in words.
        command: the command line that repeats the comparison.
    """
    from scripts.grids.draw import picture_of

    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    grids = {} if drawn is None else {GRID: drawn.grid, MOVED_GRID: drawn.moved}
    for name, grid in grids.items():
        with appearing(folder / name) as draft:
            picture_of(grid, "base and last checkpoints").save(draft, "PNG")
    sections = []
    for table in tables(files, drawn):
        name = MOVED_GRID if table.title == MOVED else ""
        sections.append(Section(table.title, table.words, table, grid=grids.get(name), picture=name))
    sections += [Section(plot.title, plot.words, plots=plot.files) for plot in draw_plots(files, folder)]
    if drawn is not None:
        sections.append(Section("Samples", grid=drawn.grid, picture=GRID))
    board = (
        "shows all runs side by side: tick them on the left. The tab Custom Scalars has the losses, rates "
        "and d of a run in one place."
    )
    sections.append(
        Section("In TensorBoard", board, command=f"tensorboard --logdir {shlex.quote(str(out / 'runs'))}")
    )
    sections.append(Section("Made with", command=command))
    head = _head(files, settings)
    bold = verdict(files)
    bold += [f"Failed: {file.label}: {sentence}" for file in files for sentence in file.failed]
    for name, text in (
        (PAGE, _html(head, bold, sections, folder)),
        (TEXT, _markdown(head, bold, sections)),
    ):
        with appearing(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
    return folder / PAGE


def _head(files: Sequence[Compared], settings: str) -> list[str]:
    """Return the sentences above the tables."""
    seeds = sorted({run.end.planned.seed for file in files for run in file.runs})
    named = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    head = [
        f"{len(files)} optimizer files, {named}; the same data, order, noise and timesteps for each file. "
        f"{settings}.",
        _trained_on(files),
    ]
    if len(seeds) > 1:
        spread = (
            "their 95% confidence intervals (Student's t)" if len(seeds) > 2 else "the lowest and the highest"
        )
        head.append(f"Numbers are means over the seeds, with {spread}.")
    if any(len(run.end.machines) > 1 for file in files for run in file.runs):
        head.append("The peak memory of resumed runs is not known.")
    return head


def _trained_on(files: Sequence[Compared]) -> str:
    """Return the machines of all runs as a sentence, which names the runs of each if they differ."""
    runs: dict[str, list[str]] = {}
    for file in files:
        for run in file.runs:
            known = dict.fromkeys(machine or "a machine that is not recorded" for machine in run.end.machines)
            runs.setdefault(", then ".join(known), []).append(f"{file.label} seed {run.end.planned.seed}")
    if len(runs) == 1:
        return f"Trained on: {next(iter(runs))}."
    words = "; ".join(f"{machine} ({', '.join(named)})" for machine, named in runs.items())
    return f"Trained on: {words}. Their times and memory do not compare."


def _html(head: Sequence[str], bold: Sequence[str], sections: Sequence[Section], folder: Path) -> str:
    from scripts.grids.draw import page_body
    from scripts.web_page import document, inlined

    parts = [f"<p><b>{escape(sentence)}</b></p>" for sentence in bold]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in head]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.table is not None:
            parts.append(section.table.html())
        sources = [inlined((folder / name).read_bytes(), "svg+xml") for name in section.plots]
        images = [f'<img src="{source}" alt="{escape(section.title)}">' for source in sources]
        parts += [f'<div class="plots">{"".join(images)}</div>'] * bool(images)
        if section.grid is not None:
            parts.append(page_body(section.grid))
        if section.command:
            parts.append(f"<pre>{escape(section.command)}</pre>")
        if section.words:
            parts.append(f'<p class="note">{escape(section.words)}</p>')
    return document(TITLE, "\n".join(parts))


def _markdown(head: Sequence[str], bold: Sequence[str], sections: Sequence[Section]) -> str:
    lines = [f"# {TITLE}", "", *(f"**{sentence}**" for sentence in bold), "", *head, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.table is not None:
            lines += [*section.table.markdown(), ""]
        for name in section.plots:
            lines += [f"![{section.title}]({name})", ""]
        if section.grid is not None:
            lines += [f"{section.grid.settings}.", "", f"![base and last checkpoints]({section.picture})", ""]
        words = [f"`{section.command}`"] * bool(section.command) + [section.words] * bool(section.words)
        if words:
            lines += [" ".join(words), ""]
    return "\n".join(lines)
