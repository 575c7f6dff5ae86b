"""Tables of a comparison: losses, costs, drift and learning rates, a row for each optimizer file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from scripts.compare.measures import Compared, Measured, networks_of
from scripts.compare.plots import colour as colour_of
from trainer.reporting.tags import FIXED_LOSS, RATE, VALIDATION_LOSS, D

if TYPE_CHECKING:
    from scripts.compare.pictures import Drawn

Measure = Callable[[Measured], float | None]

MOVED = "Prompts that moved most"

_ALIKE = 1.25
"""Ratio of two drifts below which they count as equal."""

_SURE = 3
"""Seeds from which confidence intervals are given."""


class Cell(NamedTuple):
    """A number of a table."""

    text: str
    under: str = ""
    """The smaller line below it."""


class Row(NamedTuple):
    """A row of a table: one file, or the base."""

    label: str
    ink: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    """A table, and the words that explain it."""

    title: str
    words: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]

    def html(self) -> str:
        """Return the table as HTML."""
        head = "".join(f"<th>{escape(text)}</th>" for text in ("", *self.heads))
        body = "".join(
            f"<tr>{_html_label(row)}{''.join(map(_html_cell, row.cells))}</tr>" for row in self.rows
        )
        return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'

    def markdown(self) -> list[str]:
        """Return the table as lines of Markdown."""
        lines = ["| " + " | ".join(("", *self.heads)) + " |", "|" + "---|" * (len(self.heads) + 1)]
        for row in self.rows:
            cells = [cell.text + (f" ({cell.under})" if cell.under else "") for cell in row.cells]
            lines.append("| " + " | ".join([row.label.replace("|", "\\|"), *cells]) + " |")
        return lines


def tables(files: Sequence[Compared], drawn: Drawn | None) -> list[Table]:
    """Return all tables; without samples there is none of drift."""
    drift = [] if drawn is None else [_drift(files, drawn), _moved(files, drawn)]
    return [_losses(files), _cost(files), *drift, _rates(files)]


def verdict(files: Sequence[Compared]) -> list[str]:
    """Return the sentences that answer which file did best, and how sure that is."""
    tag, words = loss_of(files)
    best = {file.label: file.over_seeds(lambda run: run.best(tag)) for file in files}
    ranked = sorted((label for label in best if best[label]), key=lambda label: fmean(best[label]))
    sentences = []
    if len(ranked) > 1:
        first, second = ranked[:2]
        share = 100 * (1 - fmean(best[first]) / fmean(best[second]))
        sentence = (
            f"{first} reached the lowest {words}, {fmean(best[first]):.4f}, {share:.1f}% below {second}"
        )
        if len(best[first]) == len(best[second]) >= _SURE:
            gaps = [mine - other for mine, other in zip(best[first], best[second], strict=True)]
            certain = fmean(gaps) + half_width(gaps) < 0
            sentence += f"; {len(gaps)} seeds {'confirm' if certain else 'do not confirm'} the difference "
            sentence += "(95% interval of the paired differences)"
        sentences.append(sentence + ".")
    moved = {file.label: fmean(colours) for file in files if (colours := _colours(file))}
    if len(moved) > 1:
        low, high = (choose(moved, key=moved.__getitem__) for choose in (min, max))
        if moved[high] <= _ALIKE * moved[low]:
            sentences.append("All files moved the colours of unrelated prompts about equally far.")
        elif moved[low] > 0:
            far = f"{moved[high] / moved[low]:.1f} times as far from the base as {low}"
            sentences.append(f"{high} moved the colours of unrelated prompts most, {far}.")
    seeds = max(len(file.runs) for file in files)
    if seeds < _SURE:
        sentences.append(
            f"{'One seed' if seeds == 1 else 'Two seeds'}: small differences between files may be chance. "
            "Three or more after --seeds give intervals."
        )
    return sentences


def loss_of(files: Sequence[Compared]) -> tuple[str, str]:
    """Return tag and name of the loss that ranks files: validation loss, or fixed-noise loss without it."""
    if any(run.curves.get(VALIDATION_LOSS) for file in files for run in file.runs):
        return VALIDATION_LOSS, "validation loss"
    return FIXED_LOSS, "fixed-noise loss"


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95% confidence interval of the mean (Student's t) of two or more values."""
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    quantile = quantiles[min(len(values) - 1, len(quantiles)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _losses(files: Sequence[Compared]) -> Table:
    has_validation = loss_of(files)[0] == VALIDATION_LOSS
    tags = [("fixed-noise", FIXED_LOSS), *([("validation", VALIDATION_LOSS)] if has_validation else [])]
    heads: list[str] = []
    measures: list[Measure] = []
    for words, tag in tags:
        heads += [f"{words} loss, final", "to the first", "lowest", "to the first"]
        measures += [lambda run, tag=tag: run.final(tag), lambda run, tag=tag: run.best(tag)]
    rows = []
    for number, file in enumerate(files):
        cells: list[Cell] = []
        for measure in measures:
            cells += [_cell(file.over_seeds(measure), ".4f"), _ratio(file, files[0], measure)]
        rows.append(Row(file.label, colour_of(number), tuple(cells)))
    words = (
        "Lowest: after the first step. To the first: the mean divided by the first file's. A lower "
        "fixed-noise loss is a closer fit to the training images"
    )
    words += "; the validation loss rises when a model memorizes them." if has_validation else "."
    return Table("Loss", words, tuple(heads), tuple(rows))


def _cost(files: Sequence[Compared]) -> Table:
    columns: list[tuple[str, str, Measure]] = [
        ("minutes an epoch", ".3g", lambda run: run.minutes),
        ("images/s", ".3g", lambda run: run.images),
        ("peak memory, GiB", ".2f", lambda run: run.memory),
        ("state, bytes a parameter", ".2f", lambda run: run.state),
        ("checkpoint, MiB", ".1f", lambda run: run.size),
    ]
    words = (
        "Medians of a run, without samples and validation. Other work on the machine shows in the times. "
        "Memory is the peak of tensors on CUDA, and of the whole process on a CPU. State is the optimizer's, "
        "for each trained parameter. The checkpoint is counted without its resume state."
    )
    return _plain_table("Cost", words, files, columns)


def _rates(files: Sequence[Compared]) -> Table:
    tags = [(f"rate at the end, {network}", RATE + network) for network in networks_of(files, RATE)]
    tags += [(f"d at the end, {network}", D + network) for network in networks_of(files, D)]
    columns: list[tuple[str, str, Measure]] = [
        (head, ".2e", lambda run, tag=tag: run.final(tag)) for head, tag in tags
    ]
    words = "D-Adaptation's rate is d times lr, times the schedule's factor."
    return _plain_table("Rates", words, files, columns)


def _plain_table(
    title: str, words: str, files: Sequence[Compared], columns: Sequence[tuple[str, str, Measure]]
) -> Table:
    """Return a table of a head, a number format and a measure a column."""
    rows = [
        Row(file.label, colour_of(number), tuple(_cell(file.over_seeds(of), form) for _, form, of in columns))
        for number, file in enumerate(files)
    ]
    return Table(title, words, tuple(head for head, _, _ in columns), tuple(rows))


def _drift(files: Sequence[Compared], drawn: Drawn) -> Table:
    base = drawn.base
    cells = [Cell("0"), Cell("0"), *(Cell(text) for value in base for text in (f"{value:.3f}", "0%"))]
    rows = [Row("base", "#1d2430", tuple(cells))]
    for number, file in enumerate(files):
        own = [_cell(_colours(file), ".3f"), _cell(_structures(file), ".3f")]
        for place, before in enumerate(base):
            values = [tone[place] for tone in file.tones]
            changes = [100 * (value / before - 1) if before else 0.0 for value in values]
            own += [_cell(values, ".3f"), _cell(changes, "+.0f", "%")]
        rows.append(Row(file.label, colour_of(number), tuple(own)))
    words = (
        f"Samples of {drawn.unrelated}, from the same noise with the base and with each last checkpoint. "
        "Colour: distance to the base's mean colour in Oklab, mean over prompts; 0.02 is just visible, red "
        "to blue 0.54. Structure: 1 - correlation with the base's sample at 32 x 32; 0 is the same "
        "composition. Saturation: largest less smallest channel, mean over pixels, 0 to 1. Contrast: "
        "standard deviation of a sample's luma, mean over samples. They tend to change before the loss shows "
        "that a model was trained too hard."
    )
    heads = ("colour", "structure", "saturation", "to the base", "contrast", "to the base")
    return Table("Drift of unrelated prompts", words, heads, tuple(rows))


def _moved(files: Sequence[Compared], drawn: Drawn) -> Table:
    from scripts.compare.pictures import moved_most

    prompts = drawn.prompts
    rows = []
    for number, file in enumerate(files):
        worst = [
            Cell(prompts[prompt], f"colour {colour:.3f}, structure {structure:.2f}")
            for prompt, (colour, structure) in moved_most(file)
        ]
        rows.append(Row(file.label, colour_of(number), tuple(worst + [Cell("–")] * (3 - len(worst)))))
    words = (
        "Of each file's first run, by colour and structure alike, each in shares of its mean over prompts."
    )
    return Table(MOVED, words, ("first", "second", "third"), tuple(rows))


def _colours(file: Compared) -> list[float]:
    """Return the mean colour distance over prompts for each run."""
    return [fmean(each.colour for _, each in run) for run in file.shifts if run]


def _structures(file: Compared) -> list[float]:
    """Return the mean structure distance over prompts for each run."""
    return [fmean(each.structure for _, each in run) for run in file.shifts if run]


def _cell(values: Sequence[float], form: str, unit: str = "") -> Cell:
    if not values:
        return Cell("–")
    under = ""
    if len(values) >= _SURE:
        under = f"±\u00a0{half_width(values):{form.lstrip('+')}}"
    elif len(values) > 1:
        under = f"{min(values):{form}} to {max(values):{form}}"
    return Cell(f"{fmean(values):{form}}{unit}", under)


def _ratio(file: Compared, first: Compared, of: Measure) -> Cell:
    ours, theirs = file.over_seeds(of), first.over_seeds(of)
    if not ours or not theirs or not fmean(theirs):
        return Cell("–")
    return Cell(f"{fmean(ours) / fmean(theirs):.3f}")


def _html_label(row: Row) -> str:
    return f'<td><span class="swatch" style="border-color:{row.ink}"></span>{escape(row.label)}</td>'


def _html_cell(cell: Cell) -> str:
    under = f'<span class="under">{escape(cell.under)}</span>' if cell.under else ""
    return f"<td>{escape(cell.text)}{under}</td>"
