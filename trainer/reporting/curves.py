"""The main curves of a run, kept from its first step and drawn as one image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from trainer.reporting.tags import current
from trainer.state_file import as_kind

MOST = 2000
"""Points of a curve, of which every second is dropped when there are more."""


class Curves:
    """A logger that keeps some of its numbers, and saves them in checkpoints for resumed runs.

    Args:
        losses: by tag, names of curves in the upper plot.
        rates: by tag, names of curves in the lower, logarithmic plot.
        noisy: the tag of a curve that is drawn thin, behind the others.
    """

    def __init__(self, losses: Mapping[str, str], rates: Mapping[str, str], noisy: str = "") -> None:
        self._losses, self._rates, self._noisy = dict(losses), dict(rates), noisy
        self._points: dict[str, list[list[float]]] = {tag: [] for tag in [*losses, *rates]}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Keep the numbers of the curves."""
        for tag in values.keys() & self._points.keys():
            points = self._points[tag]
            while points and points[-1][0] >= step:  # steps are taken back if nothing was trained in them
                points.pop()
            points.append([step, float(values[tag])])
            if len(points) > MOST:
                del points[1::2]  # the first stays for comparison

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Do nothing."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def points(self, tag: str) -> list[tuple[int, float]]:
        """Return the steps and finite values of a curve."""
        return [(int(step), value) for step, value in self._points.get(tag, []) if math.isfinite(value)]

    def state_dict(self) -> dict[str, Any]:
        """Return all points."""
        return {tag: [list(point) for point in points] for tag, points in self._points.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`, and drop curves that are not drawn any more."""
        state = {current(tag): points for tag, points in state.items()}
        for tag in self._points:
            points = as_kind(list[tuple[int, float]], state.get(tag, []))
            self._points[tag] = [list(point) for point in points]

    @property
    def begun(self) -> bool:
        """True if there is anything to draw."""
        return any(self.points(tag) for tag in self._points)

    def draw(self, path: Path) -> None:
        """Write the plots as PNG, whatever the path's extension."""
        figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot, whose state is global
        axes: Any = figure.subplots(2, 1, sharex=True)
        plots = (("loss", self._losses), ("effective learning rate", self._rates))
        for plot, (title, curves) in zip(axes, plots, strict=True):
            for tag, name in curves.items():
                points = self.points(tag)
                style = {"linewidth": 1.8}
                if tag == self._noisy:
                    style = {"alpha": 0.35, "linewidth": 1, "zorder": 1}
                if points:
                    marker = "." if len(points) < 40 else ""
                    plot.plot(*zip(*points, strict=True), label=name, marker=marker, **style)
            plot.set_ylabel(title)
            plot.grid(alpha=0.3)
            if plot.lines:
                plot.legend(frameon=False)
        if any(value > 0 for tag in self._rates for _, value in self.points(tag)):
            axes[1].set_yscale("log")
        axes[1].set_xlabel("optimizer step")
        figure.savefig(path, format="png")
