"""Work that is due after a step: fixed-noise and validation loss, best checkpoint, samples, checkpoint.

It is listed in `TrainState.pending` before it is done, so that a resumed run starts with what a signal
interrupted.
"""

from __future__ import annotations

from trainer.checkpoints.saver import Kind
from trainer.evaluation.fixed_noise import Measured
from trainer.reporting.tags import FIXED_LOSS, GAP, VALIDATION_LOSS
from trainer.training.cadence import Due
from trainer.training.health import check_gradients, check_ranks
from trainer.training.run import Run

FIXED, VALIDATION, BEST, SAMPLES, SAVE = "fixed loss", "validation", "best", "samples", "save"


def list_due(run: Run, due: Due, before: float, *, by_clock: bool) -> None:
    """List the work that is due after a step, which began at `before` epochs."""
    last = run.state.step >= run.cadence.total_steps
    validation = run.evaluation.validation.due(before, run.progress, last=last)
    wanted = {
        VALIDATION: validation,
        FIXED: due.fixed_loss and not validation,
        SAMPLES: due.sample,
        SAVE: due.save or by_clock or run.out_of_time,
    }
    run.state.pending = [work for work, is_due in wanted.items() if is_due]


def do_due(run: Run) -> None:
    """Do the pending work. On `Interrupted` the rest stays pending."""
    state = run.state
    while state.pending:
        run.signals.check()
        match state.pending[0]:
            case "fixed loss" | "validation" as work:
                evaluate(run, validation=work == VALIDATION)
            case "best":
                state.pending = state.pending[1:]  # before saving: resuming from it must not save it again
                save(run, "best")
                continue
            case "samples":
                with run.records.meter.paused(), run.evaluation.context():
                    run.evaluation.sample(state.step)
            case "save":
                state.pending = []  # it is the last, and the checkpoint has nothing pending
                save(run, "last" if state.step >= run.cadence.total_steps else "")
        state.pending = state.pending[1:]
    run.signals.check()


def save(run: Run, kind: Kind) -> None:
    """Write a checkpoint, after checking that all ranks agree and no step was made in part."""
    check_ranks(run)
    check_gradients(run)
    with run.records.meter.paused():
        run.saver.save(kind)


def evaluate(run: Run, *, validation: bool) -> None:
    """Measure and record the fixed-noise loss, and for `validation` the losses of validation images too."""
    evaluation, learner, step = run.evaluation, run.learner, run.state.step
    losses = {FIXED_LOSS: evaluation.fixed_loss} if evaluation.fixed_loss is not None else {}
    losses |= evaluation.validation.losses if validation else {}
    if not losses:
        return
    networks, precision = learner.networks.plain, learner.precision

    def measure() -> dict[str, Measured]:
        return {
            tag: loss.measure(networks, precision.autocast, precision.device, run.signals.check)
            for tag, loss in losses.items()
        }

    with run.records.meter.paused(), evaluation.context():
        measured = run.processes.first(measure)
    run.state.last_fixed_loss = step
    numbers = {tag: found.loss for tag, found in measured.items()}
    if not learner.objective.options.is_plain:
        numbers |= {f"{tag} mse": found.mse for tag, found in measured.items()}
    if FIXED_LOSS in measured and VALIDATION_LOSS in measured:
        numbers[GAP] = measured[VALIDATION_LOSS].loss - measured[FIXED_LOSS].loss
    run.records.loggers.scalars(numbers, step)
    words = {FIXED_LOSS: "fixed-noise loss", VALIDATION_LOSS: "validation loss"}
    shown = (
        f"{words.get(tag, tag.removeprefix('loss/'))} {found.loss:.4f}" for tag, found in measured.items()
    )
    run.records.console.event(f"step {step}: {', '.join(shown)}")
    judge(run, measured.get(FIXED_LOSS), measured.get(VALIDATION_LOSS))


def judge(run: Run, fixed: Measured | None, validation: Measured | None) -> None:
    """Report what the losses' curves may mean; list the best checkpoint or end the run where asked for."""
    state, evaluation, watch = run.state, run.evaluation, run.evaluation.loss_watch
    measures = run.learner.optimizers.measures()
    rates = {network: float(measured["rate"]) for network, measured in measures.items()}
    before = watch.overfitting_since
    for sentence in watch.update(
        step=state.step, fixed=fixed and fixed.loss, validation=validation and validation.loss, rates=rates
    ):
        run.records.console.event(sentence)
    if run.saver.keeps_best and validation is not None and watch.best == state.step > 0:
        state.pending = [state.pending[0], BEST, *state.pending[1:]]
    if evaluation.stop_on_overfit and watch.overfitting_since not in (before, None):
        run.records.console.event(f"step {state.step}: the run ends here, as stop_on_overfit asks.")
        run.overfits = True
        state.pending = [*(work for work in state.pending if work != SAVE), SAVE]
