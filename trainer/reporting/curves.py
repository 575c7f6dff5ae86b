"""The few curves that tell a run, kept with it from its first step on, and drawn as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.state_file import as_kind

if TYPE_CHECKING:
    from PIL import Image

MOST = 2000
"""Points that are kept of a curve; where there are more, every second one goes."""


class Curves:
    """A logger that keeps some of the numbers that it is given. They go into checkpoints, so a continued run goes on with its curves.

    Args:
        losses: by tag, what the curve is called in the upper part of the picture.
        rates: likewise in the lower part, whose axis is logarithmic.
        noisy: the tag of a curve that is drawn thin, behind the others.
    """

    def __init__(self, losses: Mapping[str, str], rates: Mapping[str, str], noisy: str = "") -> None:
        self._losses, self._rates, self._noisy = dict(losses), dict(rates), noisy
        self._points: dict[str, list[list[float]]] = {tag: [] for tag in [*losses, *rates]}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Keep the numbers of the curves."""
        for tag in values.keys() & self._points.keys():
            points = self._points[tag]
            while (
                points and points[-1][0] >= step
            ):  # of steps that were taken back, since nothing was trained in them
                points.pop()
            points.append([step, float(values[tag])])
            if len(points) > MOST:
                del points[1::2]  # the first one stays, which later ones are compared with

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Keep no picture."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Keep no text."""

    def close(self) -> None:
        """Do nothing."""

    def points(self, tag: str) -> list[tuple[int, float]]:
        """Return the steps and finite values of a curve."""
        return [(int(step), value) for step, value in self._points.get(tag, []) if math.isfinite(value)]

    def state_dict(self) -> dict[str, Any]:
        """Return all points."""
        return {tag: [list(point) for point in points] for tag, points in self._points.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; curves that are not drawn any more are dropped."""
        for tag in self._points:
            self._points[tag] = [
                list(point) for point in as_kind(list[tuple[int, float]], state.get(tag, []))
            ]

    @property
    def begun(self) -> bool:
        """Whether there is anything to draw."""
        return any(self.points(tag) for tag in self._points)

    def draw(self, path: Path) -> None:
        """Write the picture as PNG, whatever the path's ending."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)  # and no pyplot, whose state belongs to the whole process
        places: Any = figure.subplots(2, 1, sharex=True)
        for place, title, curves in zip(
            places, ("loss", "rate that acts"), (self._losses, self._rates), strict=True
        ):
            for tag, name in curves.items():
                points = self.points(tag)
                look = (
                    {"alpha": 0.35, "linewidth": 1, "zorder": 1} if tag == self._noisy else {"linewidth": 1.8}
                )
                if points:
                    place.plot(
                        *zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "", **look
                    )
            place.set_ylabel(title)
            place.grid(alpha=0.3)
            if place.lines:
                place.legend(frameon=False)
        if any(value > 0 for tag in self._rates for _, value in self.points(tag)):
            places[1].set_yscale("log")
        places[1].set_xlabel("optimizer step")
        figure.savefig(path, format="png")
