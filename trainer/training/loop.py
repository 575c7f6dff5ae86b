"""Epochs of steps, and what is due after each: report, fixed-noise loss, samples, checkpoint, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le

from trainer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from data.loader import StepLoader
    from trainer.checkpoints.format import TrainState
    from trainer.checkpoints.saver import Saver
    from trainer.diffusion.objective import Networks, Objective
    from trainer.evaluation.fixed_noise import FixedLoss, Measured, Validation
    from trainer.evaluation.loss_watch import LossWatch
    from trainer.models.ema import Ema
    from trainer.optim.optimizer_set import OptimizerSet
    from trainer.optim.watch import AdaptationWatch
    from trainer.reporting.console import Console
    from trainer.reporting.loggers import Loggers
    from trainer.reporting.metrics import Meter
    from trainer.training.due import Cadence
    from trainer.training.precision import Precision
    from trainer.training.ranks import Processes
    from trainer.training.signals import StopSignals

LOSS = "loss/log_step"
EPOCH_LOSS = "loss/epoch"
FIXED_LOSS = "loss/stabilize-train"
GAP = "loss/val minus stabilize-train"
SKIPPED = "optimizer/skipped steps"
NOT_FINITE = "optimizer/gradients not finite"
FIXED, VALIDATION, BEST, SAMPLES, SAVE = "fixed loss", "validation", "best", "samples", "save"
NORM_TAGS = {"unet": "optimizer/unet_grad_norm", "text encoder": "optimizer/te_grad_norm"}
MOST_SKIPPED = 50  # steps in a row that changed nothing; fp16's scaler finds its scale within 20
MOST_UNREAD = 10  # steps in a row of which no image could be read


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long a run lasts and what makes it repeatable."""

    max_epochs: Annotated[int, Ge(1), Le(100_000)] = 300
    """How many times every image is trained."""

    grad_accum: Annotated[int, Ge(1)] = 1
    """Batches of each process that are averaged into one optimizer step."""

    seed: Annotated[int, Ge(-1)] = 555
    """The seed of everything random; -1 draws one, logs it and saves it."""

    stop_after_steps: Annotated[int, Ge(1)] | None = None
    """Save a checkpoint and stop with exit code 0 when the run has made this many optimizer steps in all, counted from its beginning."""

    max_train_time: Annotated[float, Gt(0)] | None = None
    """Save a checkpoint and stop with exit code 0 after the first step with which the run has trained for
    this many minutes in all, over all its starts; time for loading, samples, validation and checkpoints does
    not count."""

    gpuid: Annotated[int, Ge(0)] = 0
    """Which CUDA device to train on; of several processes each takes the one of its number on its machine."""


@dataclass
class Run:
    """Everything a run is made of, put together by `trainer.run.build`."""

    folder: Path
    state: TrainState
    networks: Networks
    objective: Objective
    optimizers: OptimizerSet
    loader: StepLoader
    precision: Precision
    cadence: Cadence
    images_per_step: int
    """Images of a full step over all processes."""
    epochs: int
    """Epochs of the whole run."""
    steps_in: Callable[[int], int]
    """The number of optimizer steps of an epoch."""
    clip: float | None
    log_grad_norm: bool
    console: Console
    loggers: Loggers
    meter: Meter
    watch: AdaptationWatch
    ema: Ema | None
    fixed_loss: FixedLoss | None
    validation: Validation
    loss_watch: LossWatch
    stop_on_overfit: bool
    """Whether the run ends where the validation loss says that it may be overfitting."""
    sample: Callable[[int], None]
    """Draws, saves and records the samples of a step."""
    sample_first: bool
    """Whether samples are drawn before the first step too."""
    saver: Saver
    signals: StopSignals
    processes: Processes
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The context of what the networks do beside training: samples and losses that are compared over time."""
    max_seconds: float | None = None
    """The training time at which the run ends."""
    overfits: bool = False
    """Whether it ends for that reason."""
    bad_files_named: int = 0
    latest: Sequence[tuple[Sequence[str], Tensor]] = ()
    """Of each micro-batch of the last step, the images' names and timesteps (B,), on the CPU."""
    fed: TrainState | None = None
    """Where the run was before the first of the last steps of which no image could be read; None where the last one had some."""


def train(run: Run) -> None:
    """Train until the run's end or its early stop.

    Where something else ends it, a checkpoint is saved first, so that the steps made since the last one are
    kept.

    Raises:
        Interrupted: a signal has asked the run to end.
        UserError: the loss has not been finite for a long time, no image can be read any more, a process that
            reads them was killed, or checkpoints cannot be saved.
    """
    from data.errors import DataError
    from trainer.checkpoints.saver import SavingError
    from trainer.training.signals import Interrupted

    if run.state.step == 0:  # nothing can be lost yet, so a signal ends the run wherever it is
        run.state.owed = [VALIDATION, *([SAMPLES] if run.sample_first else [])]
        settle(run)
    with (
        run.signals.deferred()
    ):  # the saving too: where another process has died, a signal follows from whoever launched both
        try:
            make_steps(run)
        except Interrupted:
            check_gradients(run)
            run.saver.save("interrupted")
            raise
        except SavingError:
            raise
        except Exception as error:
            if (
                run.fed is not None
            ):  # nothing has been trained since: these steps can be made when the images are back
                vars(run.state).update(vars(run.fed))
            save_after(error, run)
            if isinstance(error, DataError):
                raise UserError(error.problems, exit_code=1) from error
            raise


def make_steps(run: Run) -> None:
    """Make all steps that are left and do what is due after each."""
    from trainer.training.step import train_step

    state, device = run.state, run.precision.device
    settle(run)
    while not ends(run):
        epoch = state.epoch
        if run.steps_in(epoch) == 0:  # of few images with a small multiply, none may be due
            state.epoch += 1
            continue
        steps = iter(run.loader.steps(epoch, state.step_in_epoch))
        while not ends(run) and state.epoch == epoch:
            started = time.perf_counter()
            with run.meter.waiting():
                batches = next(steps)
            images = begin_step(run, sum(len(batch) for batch in batches if not batch.filler))
            if images:
                drawn = [run.objective.draw(batch) for batch in batches]
                run.latest = [(batch.names, inputs.t_B) for batch, inputs in zip(batches, drawn, strict=True)]
                run.precision.pace(state.step)
                with run.processes.computing():
                    result = train_step(
                        [inputs.to(device) for inputs in drawn],
                        run.networks,
                        run.objective,
                        run.optimizers,
                        step=state.step,
                        images=images,
                        nominal=run.images_per_step,
                        autocast=run.precision.autocast,
                        scaler=run.precision.scaler,
                        clip=run.clip,
                        processes=run.processes.count,
                    )
                    run.processes.mean_(result.loss)
                norms = (
                    {NORM_TAGS[name]: norm for name, norm in result.norms.items()}
                    if run.log_grad_norm
                    else {}
                )
                run.meter.add({LOSS: result.loss, **norms}, images=images, totals={SKIPPED: result.skipped})
            run.fed = None if images else run.fed or replace(state)
            if run.fed is not None and state.step - run.fed.step >= MOST_UNREAD:
                raise UserError(
                    f"of the last {MOST_UNREAD} steps no image could be read (see the names above): put the images back where they were.",
                    exit_code=1,
                )
            before = progress(run)
            state.advance(images, run.steps_in(epoch), time.perf_counter() - started)
            by_clock = run.saver.due()
            if run.max_seconds is not None or run.saver.timed:  # of several processes one clock counts
                state.seconds, by_clock = run.processes.gather((state.seconds, by_clock))[0]
            if run.ema is not None:
                run.ema.after(state.step)
            run.optimizers.updating = False
            run.console.step(epoch=epoch + 1, epochs=run.epochs, step=state.step)

            epoch_ends = state.epoch > epoch
            due = run.cadence.due(
                state.step, epoch=epoch + 1, epoch_ends=epoch_ends, last_fixed_loss=state.last_fixed_loss
            )
            if due.report:
                report(run)
            if epoch_ends:
                next(steps, None)  # the loader's own end of the epoch
                run.loggers.scalars(run.meter.read_epoch(), state.step)
            validation = run.validation.due(before, progress(run), last=state.step >= run.cadence.total_steps)
            wanted = {
                VALIDATION: validation,
                FIXED: due.fixed_loss and not validation,
                SAMPLES: due.sample,
                SAVE: due.save or by_clock or out_of_time(run),
            }
            state.owed = [what for what, is_due in wanted.items() if is_due]
            settle(run)


def ends(run: Run) -> bool:
    """Return whether no step follows."""
    return run.overfits or out_of_time(run) or run.cadence.ends(run.state.step)


def out_of_time(run: Run) -> bool:
    """Return whether max_train_time is over."""
    return run.max_seconds is not None and run.state.seconds >= run.max_seconds


def progress(run: Run) -> float:
    """Return how many epochs have been trained."""
    state = run.state
    return state.epoch + (state.step_in_epoch / run.steps_in(state.epoch) if state.step_in_epoch else 0)


def settle(run: Run) -> None:
    """Do what is owed after a step. What a signal interrupts stays owed, and a continued run begins with it.

    Raises:
        Interrupted: a signal has asked the run to end.
    """
    state = run.state
    while state.owed:
        run.signals.check()
        match state.owed[0]:
            case "fixed loss" | "validation" as what:
                evaluate(run, validation=what == VALIDATION)
            case "best":
                state.owed = state.owed[
                    1:
                ]  # before it is saved: a run that goes on from it does not save it again
                check_processes(run)
                check_gradients(run)
                with run.meter.paused():
                    run.saver.save("best")
                continue
            case "samples":
                draw_samples(run)
            case "save":
                state.owed = []  # it is the last, and the checkpoint owes nothing
                check_processes(run)
                check_gradients(run)
                with run.meter.paused():
                    run.saver.save("last" if state.step >= run.cadence.total_steps else "")
        state.owed = state.owed[1:]
    run.signals.check()


def save_after(error: Exception, run: Run) -> None:
    """Keep what has been learned before an error, where it is known to be whole."""
    import torch

    if run.optimizers.updating:
        run.console.event(
            "Note: it happened while weights were updated, so no checkpoint is saved of this step."
        )
        return
    run.optimizers.zero_grad()  # where memory has run out, saving needs some too
    if run.precision.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        check_gradients(run)
        run.saver.save("errored")
    except (
        UserError,
        RuntimeError,
    ) as second:  # a broken device fails again, and the first error is the one to be told
        run.console.event(f"Note: no checkpoint could be saved after the error ({second}).")


def report(run: Run) -> None:
    """Read the numbers since the last report, the only time that the host waits for the device, and record and show them.

    Raises:
        UserError: no step has been finite for `MOST_SKIPPED` steps, or a fused backward met a gradient that
        was not.
    """
    from trainer.reporting.console import Report
    from trainer.reporting.metrics import IMAGES_PER_SECOND, memory_in_use

    latest: dict[str, Any] = {}
    for network, measures in run.optimizers.measures().items():
        latest[f"hyperparameter/lr {network}"] = measures["rate"]
        if "d" in measures:
            latest[f"dadapt/d {network}"] = measures["d"]
            latest[f"dadapt/d_hat {network}"] = measures["d_hat"]
            latest[f"dadapt/d*lr {network}"] = measures.get("d*lr", measures["rate"])
            latest[f"dadapt/decay so far {network}"] = measures["decayed"]
        if "not finite" in measures:
            latest[f"{NOT_FINITE} {network}"] = measures["not finite"]
    if run.precision.scaler is not None:
        latest["hyperparameter/grad scale"] = run.precision.scaler.get_scale()
    numbers = run.meter.read(latest)
    loss, memory = numbers.get(LOSS, math.nan), memory_in_use(run.precision.device)
    numbers["performance/vram" if run.precision.device.type == "cuda" else "performance/ram"] = memory / 2**30
    run.loggers.scalars(numbers, run.state.step)
    rates = {network: numbers[f"hyperparameter/lr {network}"] for network in run.optimizers.parameters}
    run.console.report(Report(loss, rates, numbers.get(IMAGES_PER_SECOND), memory))
    for network in run.watch.networks:
        d, d_hat = numbers[f"dadapt/d {network}"], numbers[f"dadapt/d_hat {network}"]
        for sentence in run.watch.look(network, step=run.state.step, d=d, d_hat=d_hat):
            run.console.event(sentence)
    run.loss_watch.trained(loss)
    check_processes(run)
    check_gradients(run)
    check_progress(run, int(numbers.get(SKIPPED, 0)))


def check_progress(run: Run, skipped: int) -> None:
    """Say how many steps since the last report changed nothing, and stop where none has for long.

    Args:
        run: the run.
        skipped: steps without a finite gradient since the run began.

    Raises:
        UserError: `MOST_SKIPPED` steps or more have been skipped in a row.
    """
    state = run.state
    new, made = skipped - state.skipped, state.step - state.last_report
    state.skipped, state.last_report = skipped, state.step
    if new < made:
        state.last_finite = state.step
    if new:
        run.console.event(
            f"Note: the gradients of {new} of the last {made} steps were not finite, so these steps changed nothing ({skipped} of "
            f"{state.step} in all)."
        )
    if state.step - state.last_finite >= MOST_SKIPPED:
        images = [
            f"{name} at {t}" for names, t_B in run.latest for name, t in zip(names, t_B.tolist(), strict=True)
        ]
        more = f" and {len(images) - 8} more" if len(images) > 8 else ""
        raise UserError(
            f"no step has had finite gradients since step {state.last_finite} (now at step {state.step}), so no weight has changed since; "
            f"the last one trained, each at its timestep, {', '.join(images[:8])}{more}: lower the rate, try mixed_precision: no, or "
            "look at these images.",
            exit_code=1,
        )


def check_processes(run: Run) -> None:
    """Stop where processes that train as one have come to train different models: their averaged gradients would be of neither.

    Raises:
        UserError: something that has to be the same in all processes is not.
    """
    if run.processes.count == 1:
        return
    state = run.state
    numbers = {"the step": state.step, "the epoch": state.epoch, "the images": state.images}
    for network, measures in run.optimizers.measures().items():
        numbers |= {
            f"{name} of the {network}": float(measures[name]) for name in ("d", "rate") if name in measures
        }
    if different := run.processes.difference(numbers):
        run.optimizers.updating = True  # nobody can say whose weights are right: nothing to save
        raise UserError(
            f"step {state.step}: {different}, so the processes no longer train the same model; go on from the last checkpoint, and look "
            "for a device or a version of a library that differs.",
            exit_code=1,
        )


def check_gradients(run: Run) -> None:
    """Stop where only a part of a step was made: a fused backward cannot take weights back when a later gradient is not finite.

    Raises:
        UserError: there was such a gradient since the run started.
    """
    if not run.optimizers.fused:
        return
    met = {network: int(measures["not finite"]) for network, measures in run.optimizers.measures().items()}
    if any(met.values()):
        run.optimizers.updating = True  # some weights have made the step and others have not: nothing to save
        where = " and ".join(f"{count} of the {network}" for network, count in met.items() if count)
        raise UserError(
            f"gradients were not finite although the loss was ({where}; now at step {run.state.step}): with fused_backward only these "
            "weights were left out, the others of the same step have moved; go on from the last checkpoint with fused_backward false, "
            "or with mixed_precision: no.",
            exit_code=1,
        )


def begin_step(run: Run, images: int) -> int:
    """Return the images of the step over all processes, of which this one has read `images`.

    Says once of each file that any of them could not read during the run that it is left out, and why.

    Raises:
        Interrupted, UserError: another process has been asked to end, or has failed.
    """
    found = run.processes.gather((images, run.loader.bad[run.bad_files_named :]))
    run.loader.leave_out([file for _, files in found for file in files])
    for file in run.loader.bad[run.bad_files_named :]:
        run.console.event(f"{file}; the image is left out")
    run.bad_files_named = len(run.loader.bad)
    return sum(images for images, _ in found)


def evaluate(run: Run, *, validation: bool) -> None:
    """Measure and record the losses that can be compared over time, those of held-out images only for `validation`."""
    from trainer.evaluation.validation import VALIDATION_LOSS

    losses = {FIXED_LOSS: run.fixed_loss} if run.fixed_loss is not None else {}
    losses |= run.validation.losses if validation else {}
    if not losses:
        return
    networks = run.networks.plain
    with run.meter.paused(), run.apart():
        found = run.processes.first(
            lambda: {
                tag: loss.measure(networks, run.precision.autocast, run.precision.device, run.signals.check)
                for tag, loss in losses.items()
            }
        )
    run.state.last_fixed_loss = run.state.step
    numbers = {tag: measured.loss for tag, measured in found.items()}
    if not run.objective.options.is_plain:
        numbers |= {f"{tag} mse": measured.mse for tag, measured in found.items()}
    if FIXED_LOSS in found and VALIDATION_LOSS in found:
        numbers[GAP] = found[VALIDATION_LOSS].loss - found[FIXED_LOSS].loss
    run.loggers.scalars(numbers, run.state.step)
    words = {FIXED_LOSS: "fixed-noise loss", VALIDATION_LOSS: "validation loss"}
    told = ", ".join(
        f"{words.get(tag, tag.removeprefix('loss/'))} {measured.loss:.4f}" for tag, measured in found.items()
    )
    run.console.event(f"step {run.state.step}: {told}")
    judge(run, found.get(FIXED_LOSS), found.get(VALIDATION_LOSS))


def judge(run: Run, fixed: Measured | None, validation: Measured | None) -> None:
    """Say what the course of the losses may mean, and let it save or end the run where that is asked for."""
    state, watch = run.state, run.loss_watch
    rates = {network: float(measures["rate"]) for network, measures in run.optimizers.measures().items()}
    before = watch.overfitting_since
    sentences = watch.update(
        step=state.step, fixed=fixed and fixed.loss, validation=validation and validation.loss, rates=rates
    )
    for sentence in sentences:
        run.console.event(sentence)
    if run.saver.keeps_best and validation is not None and watch.best == state.step > 0:
        state.owed = [state.owed[0], BEST, *state.owed[1:]]
    if run.stop_on_overfit and watch.overfitting_since not in (before, None):
        run.console.event(f"step {state.step}: the run ends here, as stop_on_overfit asks.")
        run.overfits = True
        state.owed = [*(what for what in state.owed if what != SAVE), SAVE]


def draw_samples(run: Run) -> None:
    """Draw, record and save the samples of the model as it is now."""
    with run.meter.paused(), run.apart():
        run.sample(run.state.step)
