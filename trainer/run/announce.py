"""The lines that a run starts with: notes, unreadable files, the plan, memory, changes of a resumed run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.report import report
from trainer.diffusion.conditioning import Tokenize
from trainer.optim.optimizer_set import OptimizerSet
from trainer.optim.schedules import rate_factor
from trainer.output import shown_path
from trainer.planning.disk import plan_disk
from trainer.planning.plan import Plan, aligned
from trainer.reporting.console import Console
from trainer.run.encode import Encoded
from trainer.run.saved import Saved
from trainer.training.precision import Precision

NAMED_FILES = 20
"""Unreadable files that are named; the rest are counted."""


def announce(
    plan: Plan,
    notes: Sequence[str],
    encoded: Encoded,
    saved: Saved,
    tokenize: Tokenize,
    precision: Precision,
    folder: Path,
    console: Console,
) -> None:
    """Show the lines that a run starts with."""
    for note in [*plan.notes, *notes]:
        console.event(f"Note: {note}")
    for held, _, bad in encoded.held_out:
        for file in bad:
            console.event(f"{file}; the image is skipped for {held.tag}")
    show_data(plan, tokenize, console)
    for line in aligned(plan.rows()):
        console.event(line, hang=13)
    disk = plan_disk(plan.config, plan.artifact, plan.counts, precision.weights)
    if short := disk.shortage(folder, resumed=plan.start.run is not None):
        console.event(f"Note: {short}.")
    if precision.device.type == "cuda":
        for line in plan.memory(precision).lines():
            console.event(line)
    about = plan.start.about
    if about is not None:
        console.event(f"Resuming after step {saved.state.step} in {shown_path(folder)}.")
        jumps = rate_jumps(saved.optimizers, saved.state.step, plan.total_steps, about["total_steps"])
        for sentence in [*plan.changed, *jumps]:
            console.event(f"Changed: {sentence}")


def show_data(plan: Plan, tokenize: Tokenize, console: Console) -> None:
    """Show what is remarkable about the images, and the files that are skipped."""
    index = plan.split.train
    found = report(index, plan.config.data, images_per_step=plan.images_per_step, tokens=tokenize)
    for note in found.notes():
        console.event(f"Note: {note}" if note.endswith("?") else f"Note: {note}.")
    for file in index.bad[:NAMED_FILES]:
        console.event(f"Skipped: {file}")
    if len(index.bad) > NAMED_FILES:
        console.event(f"... and {len(index.bad) - NAMED_FILES} more; train.py --check names them")


def rate_jumps(optimizers: OptimizerSet, step: int, total_steps: int, total_before: int) -> list[str]:
    """Return rate changes of a resumed run whose length changed, since schedules stretch over the run."""
    jumps = []
    for member in optimizers.members:
        before, now = rate_factor(member.options, total_before)(step), member.factor(step)
        if abs(now - before) > 0.01 * max(now, before):
            jumps.append(
                f"the run has {total_steps} steps instead of {total_before}, over which "
                f"{member.options.lr_scheduler} stretches: the rate of the {member.network} continues at "
                f"{now:.3g} of its full size instead of {before:.3g}"
            )
    return jumps
