"""What is due when."""

from trainer.training.cadence import Cadence


def _cadence(**changes):
    defaults = {
        "log_step": 5,
        "sample_steps": 10,
        "save_every_n_epochs": 2,
        "save_ckpts_from_n_epochs": 0,
        "total_steps": 24,
    }
    return Cadence(**{**defaults, **changes})


def _steps(cadence, what, steps_per_epoch=4):
    """Return the steps at which `what` is due, walking through the run as the loop does."""
    found, last = [], 0
    for step in range(1, cadence.total_steps + 1):
        due = cadence.due(
            step,
            epoch=-(-step // steps_per_epoch),
            epoch_ends=step % steps_per_epoch == 0,
            last_fixed_loss=last,
        )
        if due.fixed_loss:
            last = step
        if getattr(due, what):
            found.append(step)
        if due.stop:
            break
    return found


def test_reports_at_the_first_step_every_log_step_and_the_last():
    assert _steps(_cadence(), "report") == [1, 5, 10, 15, 20, 24]


def test_samples_every_n_steps_and_at_the_end():
    assert _steps(_cadence(), "sample") == [10, 20, 24]


def test_saves_after_every_nth_epoch_from_the_first_wanted_and_at_the_end():
    assert _steps(_cadence(), "save") == [8, 16, 24]
    assert _steps(_cadence(save_ckpts_from_n_epochs=3), "save") == [16, 24]
    assert _steps(_cadence(save_every_n_epochs=None), "save") == [24]
    assert _steps(_cadence(total_steps=22), "save") == [8, 16, 22]


def test_fixed_loss_follows_epochs_but_not_more_often_than_reports():
    assert _steps(_cadence(), "fixed_loss") == [8, 16, 24]
    assert _steps(_cadence(log_step=2), "fixed_loss") == [4, 8, 12, 16, 20, 24]


def test_fixed_loss_is_measured_inside_long_epochs():
    assert _steps(_cadence(log_step=2, total_steps=50), "fixed_loss", steps_per_epoch=1000) == [20, 40, 50]


def test_stopping_early_saves_and_leaves_the_curves_as_they_would_have_been():
    early = _cadence(stop_after_steps=7)
    assert _steps(early, "stop") == [7]
    assert _steps(early, "save") == [7]
    assert _steps(early, "report") == [1, 5]
    assert _steps(early, "sample") == []
