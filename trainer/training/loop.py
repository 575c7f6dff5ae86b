"""The training loop: fetch, step, account, do what is due. Read `make_steps`, then step.py."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from data.batch import Batch
from data.errors import DataError
from data.rng import stream
from trainer.checkpoints.saver import SavingError
from trainer.errors import UserError
from trainer.reporting.tags import LOSS, NORM, SKIPPED
from trainer.training.due import SAMPLES, VALIDATION, do_due, list_due
from trainer.training.health import check_gradients, check_readable, count_images
from trainer.training.reports import report
from trainer.training.run import Run
from trainer.training.signals import Interrupted
from trainer.training.step import train_step
from trainer.training.stop_text import stop_text_encoder


def train(run: Run) -> None:
    """Train until the run's end or its early stop. Any other end saves a checkpoint first.

    Raises:
        Interrupted: a signal has asked the run to end.
        UserError: the loss has not been finite for a long time, no image can be read any more, a DataLoader
            worker was killed, or checkpoints cannot be saved.
    """
    if run.state.step == 0:  # nothing can be lost yet, so a signal ends the run wherever it is
        run.state.pending = [VALIDATION, *([SAMPLES] if run.evaluation.sample_first else [])]
        do_due(run)
    with run.signals.deferred():  # saving too: if another rank has died, its launcher sends a signal
        try:
            make_steps(run)
        except Interrupted:
            check_gradients(run)
            run.saver.save("interrupted")
            raise
        except SavingError:
            raise
        except Exception as error:
            if run.health.before_unread is not None:  # nothing was trained since: repeat with the images
                vars(run.state).update(vars(run.health.before_unread))
            save_after(error, run)
            if isinstance(error, DataError):
                raise UserError(error.problems, exit_code=1) from error
            raise


def make_steps(run: Run) -> None:
    """Make all steps that are left and do what is due after each."""
    state = run.state
    do_due(run)
    while not run.ends:
        epoch = state.epoch
        if run.steps_in(epoch) == 0:  # few images with a small multiply may be due in none
            state.epoch += 1
            continue
        steps = iter(run.loader.steps(epoch, state.step_in_epoch))
        while not run.ends and state.epoch == epoch:
            started, before = time.perf_counter(), run.progress
            with run.records.meter.waiting():
                batches = next(steps)
            images = count_images(run, sum(len(batch) for batch in batches if not batch.filler))
            if images:
                learn(run, batches, images)
            check_readable(run, images)
            by_clock = account(run, images, time.perf_counter() - started)
            epoch_ends = state.epoch > epoch
            last_loss = state.last_fixed_loss
            due = run.cadence.due(
                state.step, epoch=epoch + 1, epoch_ends=epoch_ends, last_fixed_loss=last_loss
            )
            if due.report:
                report(run)
            if epoch_ends:
                end_epoch(run, steps)
            list_due(run, due, before, by_clock=by_clock)
            stop_text_encoder(run)
            do_due(run)


def learn(run: Run, batches: Sequence[Batch], images: int) -> None:
    """Make one optimizer step from this rank's micro-batches of `images` images over all ranks."""
    learner, precision = run.learner, run.learner.precision
    drawn = [learner.objective.draw(batch) for batch in batches]
    run.health.latest = [(batch.names, inputs.t_B) for batch, inputs in zip(batches, drawn, strict=True)]
    precision.pace(run.state.step)
    with run.processes.computing():
        result = train_step(
            [inputs.to(precision.device) for inputs in drawn],
            learner.networks,
            learner.objective,
            learner.optimizers,
            step=run.state.step,
            images=images,
            nominal=learner.images_per_step,
            autocast=precision.autocast,
            scaler=precision.scaler,
            clip=learner.clip,
            processes=run.processes.count,
            before=partial(_seed_dropout, run, batches) if learner.dropout else lambda number: None,
        )
        run.processes.mean_(result.loss)
    logged = result.norms.items() if run.records.log_grad_norm else ()
    norms = {f"{NORM}{network}": norm for network, norm in logged}
    run.records.meter.add({LOSS: result.loss, **norms}, images=images, totals={SKIPPED: result.skipped})


def _seed_dropout(run: Run, batches: Sequence[Batch], number: int) -> None:
    """Seed dropout by the place of a micro-batch in the run."""
    batch = batches[number]
    draws = stream(run.learner.objective.seed, "dropout", batch.epoch, batch.positions[0])
    torch.manual_seed(int(draws.integers(2**63)))


def account(run: Run, images: int, seconds: float) -> bool:
    """Count a step; return whether a checkpoint is due by the clock."""
    state, epoch = run.state, run.state.epoch
    state.advance(images, run.steps_in(epoch), seconds)
    by_clock = run.saver.due()
    if run.max_seconds is not None or run.saver.timed:  # one rank's clock counts for all
        state.seconds, by_clock = run.processes.gather((state.seconds, by_clock))[0]
    if run.learner.ema is not None:
        run.learner.ema.after(state.step)
    run.learner.optimizers.updating = False
    run.records.console.step(epoch=epoch + 1, epochs=run.epochs, step=state.step, seconds=seconds)
    return by_clock


def end_epoch(run: Run, steps: Iterator[list[Batch]]) -> None:
    """Let the loader end its epoch, and record the epoch's numbers."""
    next(steps, None)
    run.records.loggers.scalars(run.records.meter.read_epoch(), run.state.step)


def save_after(error: Exception, run: Run) -> None:
    """Save a checkpoint after an error, unless the weights may be half updated."""
    console, optimizers = run.records.console, run.learner.optimizers
    if optimizers.updating:
        console.event("Note: it happened while weights were updated, so no checkpoint is saved of this step.")
        return
    optimizers.zero_grad()  # if memory has run out, saving needs some too
    if run.learner.precision.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        check_gradients(run)
        run.saver.save("errored")
    except (UserError, RuntimeError) as second:  # a broken device fails again; the first error is raised
        console.event(f"Note: no checkpoint could be saved after the error ({second}).")
