"""Work that is due after an optimizer step, as a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """The work that follows a step."""

    report: bool
    sample: bool
    fixed_loss: bool
    save: bool
    stop: bool


@dataclass(frozen=True)
class Cadence:
    """The intervals of a run; steps are optimizer steps counted from 1, epochs likewise."""

    log_step: int
    sample_steps: int
    save_every_n_epochs: int | None
    """None saves at the end only."""
    save_ckpts_from_n_epochs: int
    total_steps: int
    stop_after_steps: int | None = None

    def ends(self, step: int) -> bool:
        """Return whether the run ends with `step`, at its end or early."""
        return step >= self.total_steps or (
            self.stop_after_steps is not None and step >= self.stop_after_steps
        )

    def due(self, step: int, *, epoch: int, epoch_ends: bool, last_fixed_loss: int) -> Due:
        """Return what is due after `step`, in `epoch`, which ends with it or not.

        An early stop is due no report of its own: the run that continues it reports what an unbroken run
        would have reported.

        The fixed-noise loss is measured when an epoch ends, at most once in `log_step` steps, and in long
        epochs every ten reports; `last_fixed_loss` is the step of its last measurement.
        """
        stop = self.ends(step)
        since = step - last_fixed_loss
        every, first = self.save_every_n_epochs, self.save_ckpts_from_n_epochs
        return Due(
            report=step == 1 or step % self.log_step == 0 or step >= self.total_steps,
            sample=step % self.sample_steps == 0 or step >= self.total_steps,
            fixed_loss=(epoch_ends and since >= self.log_step)
            or since >= 10 * self.log_step
            or step >= self.total_steps,
            save=stop or (epoch_ends and every is not None and epoch % every == 0 and epoch >= first),
            stop=stop,
        )
