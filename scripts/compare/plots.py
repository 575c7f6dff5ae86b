"""Curves of several optimizers over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.compare.measures import Compared, networks_of
from trainer.reporting.tags import FIXED_LOSS, LOSS, RATE, VALIDATION_LOSS, D

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b5179e",
    "#7a5195",
    "#8c6d00",
    "#3a3a3a",
    "#e63946",
    "#0b8a9c",
    "#5b8c00",
)
"""Of the files in their order, cycled: each has a contrast of at least 3 on white."""

_DASHES = ("-", (0, (4, 2)), (0, (6, 1.5, 1.5, 1.5)))
"""Cycled, so that lines that coincide all show."""

_WINDOW = 5


@dataclass(frozen=True)
class Plot:
    """Pictures of curves, and the words that explain them."""

    title: str
    words: str
    files: tuple[str, ...]
    """Names of pictures, one for each panel."""


def draw_plots(files: Sequence[Compared], folder: Path) -> list[Plot]:
    """Write the plots that have data as SVG into `folder`."""
    seeds = max(len(file.runs) for file in files)
    mean = " Each line is a mean over seeds." if seeds > 1 else ""
    band = " Line: mean over seeds; band: lowest to highest." if seeds > 1 else ""
    made = []

    def add(
        name: str,
        title: str,
        words: str,
        panels: Sequence[tuple[str, str]],
        *,
        log: bool,
        smooth: bool = False,
    ) -> None:
        shown = [(heading, tag) for heading, tag in panels if any(file.curve(tag) for file in files)]
        written = []
        for number, (heading, tag) in enumerate(shown, start=1):
            written.append(f"{name}-{number}.svg" if len(shown) > 1 else f"{name}.svg")
            _draw(files, folder / written[-1], heading, tag, log=log, smooth=smooth)
        if written:
            made.append(Plot(title, words + (mean if smooth else band), tuple(written)))

    add(
        "loss",
        "Training loss",
        f"Faint: the mean loss between two reports, as logged. Strong: the mean of the last {_WINDOW} such "
        "values. Timesteps and noise differ from step to step but are the same in every run: compare the "
        "distances between lines, not the bumps that they share.",
        [("", LOSS)],
        log=False,
        smooth=True,
    )
    add(
        "fixed",
        "Fixed-noise loss and validation loss",
        "The same images, noise and timesteps at every measurement; nothing is smoothed.",
        [("training images (fixed-noise loss)", FIXED_LOSS), ("validation images", VALIDATION_LOSS)],
        log=False,
    )
    add(
        "rates",
        "Effective learning rate",
        "With the schedule's factor, and for D-Adaptation with d. Logarithmic.",
        [(network, RATE + network) for network in networks_of(files, RATE)],
        log=True,
    )
    add(
        "d",
        "D-Adaptation's d",
        "Files with a fixed rate have no d. Logarithmic.",
        [(network, D + network) for network in networks_of(files, D)],
        log=True,
    )
    return made


def colour(number: int) -> str:
    """Return a file's colour by its number."""
    return COLOURS[number % len(COLOURS)]


def _draw(files: Sequence[Compared], path: Path, heading: str, tag: str, *, log: bool, smooth: bool) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axis = figure.subplots()
    ends = []
    for number, file in enumerate(files):
        points = file.curve(tag)
        if not points:
            continue
        steps = list(points)
        means = [mean for mean, _, _ in points.values()]
        style: dict[str, Any] = {"color": colour(number), "linestyle": _DASHES[number % len(_DASHES)]}
        shown = _smoothed(means) if smooth else means
        if smooth:
            axis.plot(steps, means, alpha=0.25, linewidth=0.9, color=style["color"])
        marker = "o" if not smooth and len(steps) <= 40 else None
        axis.plot(steps, shown, linewidth=1.7, marker=marker, markersize=3.2, **style)
        if len(file.runs) > 1 and not smooth:
            axis.fill_between(
                steps, [low for _, low, _ in points.values()], [high for *_, high in points.values()],
                alpha=0.15, color=style["color"], linewidth=0,
            )  # fmt: skip
        ends.append((shown[-1], file.label, style["color"]))
    axis.set_xlim(right=max(max(file.curve(tag), default=0) for file in files))
    if log:
        axis.set_yscale("log")
    axis.set_title(heading, fontsize=10, loc="left")
    axis.set_xlabel("optimizer step")
    axis.grid(True, alpha=0.25, linewidth=0.6, which="major")
    axis.spines[["top", "right"]].set_visible(False)
    _label_ends(axis, ends)
    with rc_context({"svg.hashsalt": path.name}):  # the same curves make the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


def _label_ends(axis: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name beside its end, moved up or down where names would cover each other."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # data coordinates are known only afterwards
    height = axis.get_window_extent().height
    to_share = [
        float(axis.transAxes.inverted().transform(axis.transData.transform((0, value)))[1])
        for value, _, _ in ends
    ]
    least = 13 * figure.dpi / 72 / height
    order = sorted(range(len(ends)), key=lambda place: to_share[place])
    placed: dict[int, float] = {}
    lowest = 0.0
    for place in order:
        placed[place] = lowest = max(min(max(to_share[place], 0.0), 1.0), lowest)
        lowest += least
    highest = 1.0
    for place in reversed(order):  # names pushed out at the top come down again
        placed[place] = min(placed[place], highest)
        highest = placed[place] - least
    for place, (_, label, ink) in enumerate(ends):
        axis.annotate(
            label,
            xy=(1.0, to_share[place]),
            xytext=(1.05, placed[place]),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=ink,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": ink,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return at each place the mean of the last few values up to it."""
    return [
        sum(part) / len(part)
        for end in range(1, len(values) + 1)
        if (part := values[max(0, end - _WINDOW) : end])
    ]
