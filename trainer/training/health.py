"""Checks of a run's health: readable images, finite gradients, ranks that agree."""

from __future__ import annotations

from dataclasses import replace

from trainer.errors import UserError
from trainer.training.run import Run

MOST_SKIPPED = 50
"""Steps in a row that change nothing before the run ends; fp16's scaler finds its scale within 20."""

MOST_UNREAD = 10
"""Steps in a row without a readable image before the run ends."""


def count_images(run: Run, images: int) -> int:
    """Return the images of a step over all ranks, of which this rank has read `images`.

    Reports each unreadable file once.
    """
    loader, health = run.loader, run.health
    found = run.processes.gather((images, loader.bad[health.named_files :]))
    loader.leave_out([file for _, files in found for file in files])
    for file in loader.bad[health.named_files :]:
        run.records.console.event(f"{file}; the image is skipped")
    health.named_files = len(loader.bad)
    return sum(images for images, _ in found)


def check_readable(run: Run, images: int) -> None:
    """Stop after `MOST_UNREAD` steps in a row without a readable image."""
    state, health = run.state, run.health
    health.before_unread = None if images else health.before_unread or replace(state)
    if health.before_unread is not None and state.step - health.before_unread.step >= MOST_UNREAD:
        raise UserError(
            f"of the last {MOST_UNREAD} steps no image could be read (see the names above): "
            "put the images back where they were.",
            exit_code=1,
        )


def check_progress(run: Run, skipped: int) -> None:
    """Report skipped steps, of `skipped` since the start, and stop after `MOST_SKIPPED` in a row."""
    state = run.state
    new, made = skipped - state.skipped, state.step - state.last_report
    state.skipped, state.last_report = skipped, state.step
    if new < made:
        state.last_finite = state.step
    if new:
        run.records.console.event(
            f"Note: the gradients of {new} of the last {made} steps were not finite, so these steps changed "
            f"nothing ({skipped} of {state.step} in all)."
        )
    if state.step - state.last_finite >= MOST_SKIPPED:
        latest = run.health.latest
        images = [
            f"{name} at {t}" for names, t_B in latest for name, t in zip(names, t_B.tolist(), strict=True)
        ]
        more = f" and {len(images) - 8} more" if len(images) > 8 else ""
        raise UserError(
            f"no step has had finite gradients since step {state.last_finite} (now at step {state.step}), so "
            "no weight has changed since; the last one trained, each at its timestep, "
            f"{', '.join(images[:8])}{more}: lower the rate, try mixed_precision: no, "
            "or look at these images.",
            exit_code=1,
        )


def check_ranks(run: Run) -> None:
    """Stop if ranks train different models: averaged gradients would fit neither."""
    if run.processes.count == 1:
        return
    state = run.state
    numbers = {"the step": state.step, "the epoch": state.epoch, "the images": state.images}
    for network, measures in run.learner.optimizers.measures().items():
        numbers |= {
            f"{name} of the {network}": float(measures[name]) for name in ("d", "rate") if name in measures
        }
    if different := run.processes.difference(numbers):
        run.learner.optimizers.updating = True  # nobody can say whose weights are right: nothing to save
        raise UserError(
            f"step {state.step}: {different}, so the processes no longer train the same model; resume from "
            "the last checkpoint, and look for a device or a version of a library that differs.",
            exit_code=1,
        )


def check_gradients(run: Run) -> None:
    """Stop if a step was made in part: fused backward cannot undo updates before an infinite gradient."""
    optimizers = run.learner.optimizers
    if not optimizers.fused:
        return
    met = {network: int(measures["not finite"]) for network, measures in optimizers.measures().items()}
    if any(met.values()):
        optimizers.updating = True  # some weights have made the step and others have not: nothing to save
        where = " and ".join(f"{count} of the {network}" for network, count in met.items() if count)
        raise UserError(
            f"gradients were not finite although the loss was ({where}; now at step {run.state.step}): with "
            "fused_backward only these weights were skipped, the others of the same step have moved; resume "
            "from the last checkpoint with fused_backward false, or with mixed_precision: no.",
            exit_code=1,
        )
