"""The report as a page of Markdown, its tables as docs/evidence.md has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

BASE = "adamw8bit"
POST_TIME, POST_MEMORY = 1.37, 24 / 14
"""Epoch time and memory of D-Adaptation relative to AdamW8bit in the first published comparison on Stable Diffusion."""
GIB = 2**30
Result = dict[str, Any]


def page(report: dict[str, Any]) -> str:
    """Return the page of what has been found so far."""
    steps: dict[str, dict[str, Any]] = report["steps"]
    lines = [f"# GPU report, {report['date']}", ""]
    if report["tiny"]:
        lines += ["Made with the bundled model to try the report out: **its numbers say nothing about a GPU.**", ""]
    lines += [*_summary(training_rows(steps)), ""]
    parts = (_environment, _training, _profile)
    return "\n".join([*lines, *(line for part in parts for line in part(steps)), *_course(steps), ""])


def training_rows(steps: dict[str, dict[str, Any]]) -> list[Result]:
    """Return the measured training steps of every optimizer, with its name, number of trained weights, launches and waits."""
    rows = []
    for name, step in steps.items():
        if not name.startswith("training "):
            continue
        shared = {"name": name.removeprefix("training ")}
        for kind, keys in (("built", ("trained",)), ("launches", ("launches", "busy", "cpu")), ("waits", ("count",))):
            for found in results(step, kind):
                shared |= {key: found[key] for key in keys}
        rows += [{**shared, **found} for found in results(step, "steps")]
    return rows


def results(step: dict[str, Any] | None, kind: str) -> list[Result]:
    """Return a step's results of one kind."""
    return [] if step is None else [found for found in step["results"] if found["kind"] == kind]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a Markdown table, its first column aligned to the left, the others to the right; nothing without rows."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        return []
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *cells]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _summary(rows: list[Result]) -> list[str]:
    base = {row["images"]: row for row in rows if row["name"] == BASE}
    lines = []
    for row in rows:
        other = base.get(row["images"])
        if other is None or not row["name"].startswith("dadapt"):
            continue
        memory = f", memory **{row['allocated'] / other['allocated']:.2f}**" if "allocated" in row and "allocated" in other else ""
        lines.append(f"- {row['name']}, batch {row['images']}: time **{row['whole'] / other['whole']:.2f}**{memory}")
    title = "D-Adaptation relative to AdamW8bit, time of an epoch (steps of the same images) and peak memory:"
    first = f"- published first comparison: time {POST_TIME:.2f}, memory {POST_MEMORY:.2f} (24 against 14 GB); the goal: at most 1.00"
    return [title, "", first, *(lines or ["- not measured yet"])]


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
            f"Copying {found['copy']:.0f} GB/s (read and written); products {found['product']:.1f} TFLOPS {found['product_dtype']}.",
            "",
        ]
    return lines


def _training(steps: dict[str, dict[str, Any]]) -> list[str]:
    rows = training_rows(steps)
    header = ("optimizer", "batch", "images/s", "step ms", "forward", "backward", "optimizer", "host", "first s")
    times = table(
        header,
        ((row["name"], row["images"], row["images"] / row["whole"] * 1e3, *(row[part] for part in _PARTS), row["first"]) for row in rows),
    )
    header = ("optimizer", "batch", "allocated GiB", "reserved", "estimated", "estimated / allocated", "beside", "state B/weight")
    memory = table(header, ((row["name"], row["images"], *_memory(row)) for row in rows))
    launches = table(
        ("optimizer", "launches a step", "GPU busy ms", "CPU ms", "waits for the GPU"),
        (
            (name, *(row.get(key) for key in ("launches", "busy", "cpu", "count")))
            for name, row in {row["name"]: row for row in rows}.items()
        ),
    )
    title = (
        "## Training steps: Stable Diffusion 1.5, UNet and text encoder, 512 px, 16-bit autocast, gradient checkpointing, cached latents"
    )
    if not rows:
        return [title, "", "not measured yet", ""]
    return [
        title,
        "",
        "Milliseconds, medians. `backward` has the updates of an optimizer that steps inside it.",
        "",
        *times,
        *memory,
        *launches,
    ]


_PARTS = ("whole", "forward", "backward", "optimizer", "host")


def _memory(row: Result) -> tuple[object, ...]:
    estimated, state = row["estimated"] / GIB, row["state"] / row["trained"]
    if "allocated" not in row:
        return (None, None, estimated, None, None, state)
    allocated = row["allocated"] / GIB
    return (allocated, row["reserved"] / GIB, estimated, estimated / allocated, row["beside"] / GIB, state)


def _profile(steps: dict[str, dict[str, Any]]) -> list[str]:
    step = steps.get("profile")
    header = ("changed", "batch", "images/s", "step ms", "forward", "backward", "optimizer", "host")
    lines = table(
        header,
        (
            (found["change"], found["images"], found["images"] / found["whole"] * 1e3, *(found[part] for part in _PARTS))
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
            f"{found['wall']:.0f} ms with tracing, of which the GPU computes {found['busy']:.0f} ms ({share:.0%}): "
            f"{found['launches']} launches, {found['operators']} host operators.",
            "",
        ]
        for title, key in (("kernel", "kernels"), ("host operator, own time", "host")):
            rows = ((f"`{entry['name'][:90]}`", entry["milliseconds"], entry["count"]) for entry in found[key])
            lines += table((title, "ms", "calls"), rows)
    return ["## Where the time of an AdamW8bit step goes", "", *lines] if lines else []


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
