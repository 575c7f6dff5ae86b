"""Figures of the GPU report: rows of training steps, bandwidth floors, epochs and ratios."""

from __future__ import annotations

import statistics
from typing import Any

BASE = "adamw8bit"
Result = dict[str, Any]


def training_rows(steps: dict[str, dict[str, Any]]) -> list[Result]:
    """Return a row for every measured training step: its optimizer, times, memory, estimate and floor."""
    rows: list[Result] = []
    estimates = {
        (found["optimizer"], found["images"]): found["bytes"]
        for step in steps.values()
        for found in results(step, "estimate")
    }
    speeds = results(steps.get("environment"), "speed")
    for name, step in steps.items():
        kind, _, optimizer = name.partition(" ")
        if kind not in ("training", "largest"):
            continue
        shared: Result = {"name": optimizer}
        for found in [found for kind in ("built", "launches", "waits") for found in results(step, kind)]:
            shared |= {key: value for key, value in found.items() if key not in ("kind", "images", "seconds")}
        for found in results(step, "steps"):
            row = {**shared, **found, "estimated": estimates.get((optimizer, found["images"]))}
            if speeds and "fused" not in optimizer:  # whose updates are inside backward
                row["floor"] = floor(row, speeds[0]["copy"])
            rows.append(row)
    return rows


def floor(row: Result, copy: float) -> float | None:
    """Return the least milliseconds of an optimizer's step: its memory traffic at the measured copy speed.

    Gradients are read once, weights and state read and written once, all but state in fp32.
    """
    return (12 * row["trained"] + 2 * row["state"]) / copy / 1e6


def alone_rows(steps: dict[str, dict[str, Any]]) -> list[Result]:
    """Return a row for every optimizer's steps alone, with its floor if the copy speed was measured."""
    speeds = results(steps.get("environment"), "speed")
    return [
        {**found, "floor": floor(found, speeds[0]["copy"]) if speeds else None}
        for found in results(steps.get("alone"), "alone")
    ]


def results(step: dict[str, Any] | None, kind: str) -> list[Result]:
    """Return a step's results of one kind."""
    return [] if step is None else [found for found in step["results"] if found["kind"] == kind]


def ratios(steps: dict[str, dict[str, Any]]) -> list[tuple[str, float, float | None]]:
    """Return D-Adaptation's ratios to AdamW8bit: a label, time, and memory if it was measured."""
    found: list[tuple[str, float, float | None]] = []
    epochs, peaks = epoch_seconds(steps), epoch_peaks(steps)
    found += [
        (
            f"{name}, whole epochs",
            seconds / epochs[BASE],
            peaks[name] / peaks[BASE] if name in peaks and BASE in peaks else None,
        )
        for name, seconds in epochs.items()
        if BASE in epochs and name != BASE
    ]
    rows = training_rows(steps)
    base = {row["images"]: row for row in rows if row["name"] == BASE}
    for row in rows:
        other = base.get(row["images"])
        if other is not None and row["name"].startswith("dadapt"):
            memory = (
                row["allocated"] / other["allocated"] if "allocated" in row and "allocated" in other else None
            )
            found.append(
                (f"{row['name']}, steps of batch {row['images']}", row["whole"] / other["whole"], memory)
            )
    return found


def epoch_seconds(steps: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the median time of an epoch by optimizer."""
    found = {}
    for name, step in steps.items():
        seconds = [epoch["seconds"] for epoch in results(step, "epoch") if epoch["counted"]]
        if seconds:
            found[name.partition(" ")[2]] = statistics.median(seconds)
    return found


def epoch_peaks(steps: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return the peak bytes of tensors over all epochs by optimizer, if they were measured."""
    found = {}
    for name, step in steps.items():
        peaks = [epoch["allocated"] for epoch in results(step, "epoch") if "allocated" in epoch]
        if peaks:
            found[name.partition(" ")[2]] = max(peaks)
    return found
