"""The report as Markdown, with tables for docs/evidence.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scripts.gpu.figures import Result, alone_rows, epoch_peaks, epoch_seconds, ratios, results, training_rows

POST_TIME, POST_MEMORY = 1.37, 24 / 14
"""Time and memory of D-Adaptation to AdamW8bit in the first published comparison on Stable Diffusion."""
GIB = 2**30


def page(report: dict[str, Any]) -> str:
    """Return the page of the results so far."""
    steps: dict[str, dict[str, Any]] = report["steps"]
    lines = [f"# GPU report, {report['date']}", ""]
    if report["tiny"]:
        lines += [
            "Made with the bundled model to test the report: **its numbers say nothing about a GPU.**",
            "",
        ]
    lines += [*_summary(steps), ""]
    parts = (_environment, _correctness, _epochs, _training, _alone, _profile, _runs)
    return "\n".join([*lines, *(line for part in parts for line in part(steps)), *_course(steps), ""])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a Markdown table, first column left-aligned, others right-aligned; nothing without rows."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        return []
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *cells]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _summary(steps: dict[str, dict[str, Any]]) -> list[str]:
    published = ("published first comparison (24 against 14 GB)", POST_TIME, POST_MEMORY)
    rows = [published, ("the goal, at most", 1.0, 1.0), *ratios(steps)]
    lines = table(("D-Adaptation : AdamW8bit", "time", "peak memory"), rows)
    return [*lines[:-1], *([] if len(rows) > 2 else ["| not measured yet | | |"])]


def _environment(steps: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for found in results(steps.get("environment"), "machine"):
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        rows = [
            ("GPU", found.get("gpu")),
            ("memory, GiB", f"{found['memory'] / GIB:.1f}" if "memory" in found else None),
            ("compute capability", found.get("capability")),
            ("driver, CUDA", f"{found.get('driver')}, {found.get('cuda')}" if "gpu" in found else None),
            ("compiler", found["compiler"] or "not found"),
            ("system", f"{found['system']}, Python {found['python']}"),
            ("versions", versions),
            ("not as pinned", ", ".join(found["differs"]) or "none"),
        ]
        lines += ["## Environment", "", *table(("", ""), [row for row in rows if row[1]])]
    for found in results(steps.get("environment"), "speed"):
        lines += [
            f"Copying {found['copy']:.0f} GB/s (read and written); products {found['product']:.1f} TFLOPS "
            f"{found['product_dtype']}.",
            "",
        ]
    return lines


def _correctness(steps: dict[str, dict[str, Any]]) -> list[str]:
    lines = table(
        (
            "steps on the device against eager steps on the CPU",
            "steps",
            "d grew",
            "d, relative difference",
            "weights, relative to their change",
        ),
        (
            (
                found["optimizer"],
                found["steps"],
                _small(found["grown"]),
                _small(found["d"]),
                _small(found["weights"]),
            )
            for found in results(steps.get("agreement"), "agreement")
        ),
    )
    lines += table(
        ("compared with an unbroken run", "tensors", "that differ in a bit", "largest difference"),
        (
            (found["what"], found["tensors"], found["differing"], _small(found["largest"]))
            for found in results(steps.get("resumed"), "equality")
        ),
    )
    for found in results(steps.get("resumed"), "not deterministic"):
        lines += [
            f"Operators without a deterministic implementation: {', '.join(found['operators']) or 'none'}.",
            "",
        ]
    for found in results(steps.get("tests"), "tests"):
        lines += [
            "Tests that need a GPU: "
            + ", ".join(f"{count} {name}" for name, count in found.items() if name != "kind")
            + ".",
            "",
        ]
    lines += table(
        ("failed test", "reason"),
        ((found["test"], found["reason"]) for found in results(steps.get("tests"), "failure")),
    )
    return ["## Correctness", "", *lines] if lines else []


def _epochs(steps: dict[str, dict[str, Any]]) -> list[str]:
    images = {
        name.partition(" ")[2]: epoch["images"]
        for name, step in steps.items()
        for epoch in results(step, "epoch")
    }
    peaks = epoch_peaks(steps)
    rows = [
        (name, images[name], seconds, images[name] / seconds, peaks[name] / GIB if name in peaks else None)
        for name, seconds in epoch_seconds(steps).items()
    ]
    lines = table(("optimizer", "images of an epoch", "seconds", "images/s", "allocated GiB"), rows)
    title = "## Epochs of the whole program: configs/sd15.json, batch 4, without samples and checkpoints"
    return [title, "", *lines] if lines else []


def _training(steps: dict[str, dict[str, Any]]) -> list[str]:
    title = (
        "## Training steps: Stable Diffusion 1.5, UNet and text encoder, 512 px, 16-bit autocast, "
        "gradient checkpointing, cached latents"
    )
    legend = (
        "Milliseconds, medians. `backward` includes the updates of an optimizer that steps inside it. "
        "`floor`: the optimizer's memory traffic at the measured copy speed. `host`: until all work was "
        "launched; if it equals the step, the CPU is the limit. `beside`: memory beyond torch's allocator."
    )
    rows = training_rows(steps)
    tables = [*_times(rows), *_memory(rows), *_launches(rows)]
    return [title, "", *([legend, "", *tables] if rows else ["not measured yet", ""])]


def _times(rows: Sequence[Result]) -> list[str]:
    parts = ("whole", "forward", "backward", "optimizer", "floor", "host", "first")
    header = ("optimizer", "batch", "images/s", "step ms", *parts[1:6], "first s")
    return table(
        header,
        (
            (
                row["name"],
                row["images"],
                row["images"] / row["whole"] * 1e3,
                *(row.get(part) for part in parts),
            )
            for row in rows
        ),
    )


def _memory(rows: Sequence[Result]) -> list[str]:
    header = ("allocated GiB", "reserved", "estimated", "estimated / allocated", "beside", "state B/weight")
    lines = []
    for row in rows:
        allocated, reserved, estimated, beside = (
            row[key] / GIB if row.get(key) is not None else None
            for key in ("allocated", "reserved", "estimated", "beside")
        )
        ratio = estimated / allocated if allocated and estimated else None
        state = row["state"] / row["trained"]
        lines.append((row["name"], row["images"], allocated, reserved, estimated, ratio, beside, state))
    return table(("optimizer", "batch", *header), lines)


def _launches(rows: Sequence[Result]) -> list[str]:
    keys = ("launches", "busy", "cpu", "count")
    measured = {row["name"]: row for row in rows if "launches" in row}
    return table(
        ("optimizer", "launches a step", "GPU busy ms", "CPU ms", "waits for the GPU", "in lines"),
        (
            (name, *(row.get(key) for key in keys), ", ".join(row.get("where", ())))
            for name, row in measured.items()
        ),
    )


_PARTS = ("whole", "forward", "backward", "optimizer", "host")


def _alone(steps: dict[str, dict[str, Any]]) -> list[str]:
    rows = (
        (
            row["optimizer"],
            row["whole"],
            row["host"],
            row["floor"],
            row["whole"] / row["floor"] if row["floor"] else None,
            row["state"] / row["trained"],
            row["first"],
        )
        for row in alone_rows(steps)
    )
    header = ("optimizer", "ms", "host", "floor", "ms / floor", "state B/weight", "first s")
    lines = table(header, rows)
    title = "## Optimizer steps alone: UNet and text encoder, fp32 weights, random gradients"
    return [title, "", *lines] if lines else []


def _profile(steps: dict[str, dict[str, Any]]) -> list[str]:
    step = steps.get("profile")
    header = ("changed", "batch", "images/s", "step ms", "forward", "backward", "optimizer", "host")
    lines = table(
        header,
        (
            (
                found["change"],
                found["images"],
                found["images"] / found["whole"] * 1e3,
                *(found[part] for part in _PARTS),
            )
            for found in results(step, "variant")
        ),
    )
    for found in results(step, "drawing"):
        lines += [f"Drawing a step's random numbers takes the CPU {found['milliseconds']:.1f} ms.", ""]
    for found in results(step, "trace"):
        share = found["busy"] / found["wall"]
        lines += [
            f"### One traced step, {found['change']}",
            "",
            f"{found['wall']:.0f} ms with tracing, of which the GPU computes {found['busy']:.0f} ms "
            f"({share:.0%}): {found['launches']} launches, {found['operators']} host operators.",
            "",
        ]
        for title, key in (("kernel", "kernels"), ("host operator, own time", "host")):
            rows = (
                (f"`{entry['name'][:90]}`", entry["milliseconds"], entry["count"]) for entry in found[key]
            )
            lines += table((title, "ms", "calls"), rows)
    return ["## Profile of an AdamW8bit step", "", *lines] if lines else []


def _runs(steps: dict[str, dict[str, Any]]) -> list[str]:
    step = steps.get("first run")
    rows = [
        (found["step"], found["what"], _small(found["device"]), _small(found["cpu"]))
        for found in results(step, "compared")
    ]
    lines = table(("step", "", "on the device", "on the CPU"), rows)
    speed = (
        [f"{found['images per second']:.1f} images/s on the device.", ""]
        if (found := next(iter(results(step, "speed")), None))
        else []
    )
    return ["## First run of the bundled model", "", *speed, *lines] if lines else []


def _small(value: float | None) -> str | None:
    """Return a number of any size, in four digits."""
    return None if value is None else f"{value:.4g}"


def _course(steps: dict[str, dict[str, Any]]) -> list[str]:
    rows = ((name, step["status"], step["seconds"], step["reason"] or None) for name, step in steps.items())
    return ["## Steps of this report", "", *table(("step", "status", "seconds", "reason"), rows)]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")
