"""The report's picture: time and memory of each optimizer, with ratios to AdamW8bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.gpu.figures import BASE, training_rows
from scripts.gpu.page import GIB

IMAGES = 4
"""Batch size of the bars, if it was measured."""
COLOURS = {BASE: "#9aa0a6", "dadapt_adam_reference": "#d98c5f"}
OURS = "#3f7fbf"


def draw(report: dict[str, Any], path: Path) -> bool:
    """Draw the picture; return False if nothing was measured or matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib.figure import Figure

    measured = training_rows(report["steps"])
    sizes = {row["images"] for row in measured}
    images = IMAGES if IMAGES in sizes else min(sizes, default=0)
    rows = [row for row in measured if row["images"] == images][::-1]
    if not rows:
        return False
    figure = Figure(figsize=(10, 1.3 + 0.5 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["name"] for row in rows]
    colours = [COLOURS.get(name, OURS) for name in names]
    milliseconds = [row["whole"] for row in rows]
    left.bar_label(
        left.barh(names, milliseconds, color=colours), _labels(rows, milliseconds, "{:.0f}"), padding=3
    )
    left.set_xlabel("milliseconds of a step")
    memory = [row.get("allocated", row["estimated"] or 0) / GIB for row in rows]
    right.bar_label(right.barh(names, memory, color=colours), _labels(rows, memory, "{:.2f}"), padding=3)
    right.set_xlabel(
        "GiB of tensors at the peak" if "allocated" in rows[0] else "GiB of tensors at the peak, estimated"
    )
    for axes in (left, right):
        axes.margins(x=0.35)
        axes.spines[["top", "right"]].set_visible(False)
    gpu = next(
        (
            found.get("gpu")
            for found in report["steps"].get("environment", {}).get("results", [])
            if "versions" in found
        ),
        None,
    )
    model = "bundled model, a test of the report" if report["tiny"] else "Stable Diffusion 1.5, 512 px"
    figure.suptitle(f"{model}, batch {images}, {gpu or 'CPU'}, {report['date']}")
    figure.savefig(path, dpi=110)
    return True


def _labels(rows: list[dict[str, Any]], values: list[float], number: str) -> list[str]:
    """Return a label for each bar: its value, and its ratio to AdamW8bit's."""
    base = next((value for row, value in zip(rows, values, strict=True) if row["name"] == BASE), None)
    ratios = [
        f"  ({value / base:.2f}x)" if base and row["name"] != BASE else ""
        for row, value in zip(rows, values, strict=True)
    ]
    return [number.format(value) + ratio for value, ratio in zip(values, ratios, strict=True)]
