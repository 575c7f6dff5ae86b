"""Work after a step: listed, done in order, kept where a signal comes, on a run without networks."""

from types import SimpleNamespace

import pytest

from tests.unit.trainer.training.fake import Losses, fake_run
from trainer.reporting.tags import FIXED_LOSS, GAP, VALIDATION_LOSS
from trainer.training.cadence import Due
from trainer.training.due import BEST, FIXED, SAMPLES, SAVE, VALIDATION, do_due, list_due
from trainer.training.signals import Interrupted

NOTHING = Due(report=False, sample=False, fixed_loss=False, save=False, stop=False)
ALL = Due(report=True, sample=True, fixed_loss=True, save=True, stop=True)


def test_validation_takes_the_place_of_the_fixed_noise_loss():
    run = fake_run(validation={VALIDATION_LOSS: Losses()})
    list_due(run, ALL, 1.0, by_clock=False)
    assert run.state.pending == [FIXED, SAMPLES, SAVE]
    run.state.step = 24
    list_due(run, ALL, 1.0, by_clock=False)
    assert run.state.pending == [VALIDATION, SAMPLES, SAVE]


def test_the_clock_and_the_end_of_the_time_save():
    run = fake_run()
    list_due(run, NOTHING, 1.0, by_clock=True)
    assert run.state.pending == [SAVE]
    run.max_seconds = 0.0
    list_due(run, NOTHING, 1.0, by_clock=False)
    assert run.state.pending == [SAVE]


def test_work_is_done_in_order_and_a_checkpoint_has_nothing_pending():
    run = fake_run(fixed=Losses(0.25))
    run.state.pending = [FIXED, SAMPLES, SAVE]
    run.saver.save = lambda kind: run.done.append(("save", kind, list(run.state.pending)))
    do_due(run)
    assert run.done == [
        ("scalars", {FIXED_LOSS: 0.25}, 5),
        ("event", "step 5: fixed-noise loss 0.2500"),
        ("samples", 5),
        ("save", "", []),
    ]
    assert run.state.pending == [] and run.state.last_fixed_loss == 5


def test_a_signal_leaves_the_rest_pending():
    run = fake_run(fixed=Losses(0.25))
    run.state.pending = [FIXED, SAMPLES, SAVE]

    def check():
        if run.state.pending[:1] == [SAMPLES]:
            raise Interrupted(15)

    run.signals.check = check
    with pytest.raises(Interrupted):
        do_due(run)
    assert run.state.pending == [SAMPLES, SAVE]


def test_the_lowest_validation_loss_saves_the_best_checkpoint_before_all_else():
    run = fake_run(fixed=Losses(0.2), validation={VALIDATION_LOSS: Losses(0.3)})
    run.evaluation.loss_watch.best = 5
    run.state.pending = [VALIDATION, SAMPLES]
    do_due(run)
    numbers = run.done[0][1]
    assert numbers[GAP] == pytest.approx(0.1)
    assert [entry for entry in run.done if entry[0] in ("save", "samples")] == [
        ("save", BEST),
        ("samples", 5),
    ]


def test_stop_on_overfit_saves_last_and_ends_the_run():
    watch = SimpleNamespace(overfitting_since=None, best=None)

    def update(**_):
        watch.overfitting_since = 3
        return ["It may be overfitting."]

    watch.update = update
    run = fake_run(fixed=Losses(0.2), validation={VALIDATION_LOSS: Losses(0.3)}, watch=watch)
    run.state.pending = [VALIDATION, SAVE, SAMPLES]
    do_due(run)
    assert run.overfits and run.ends
    assert [entry[0] for entry in run.done if entry[0] in ("save", "samples")] == ["samples", "save"]
