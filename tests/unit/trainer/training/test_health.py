"""Signs that a run has stopped learning, on a run without networks."""

from types import SimpleNamespace

import pytest
import torch

from tests.unit.trainer.training.fake import fake_run
from trainer.errors import UserError
from trainer.training.health import (
    MOST_SKIPPED,
    MOST_UNREAD,
    check_gradients,
    check_progress,
    check_ranks,
    check_readable,
    count_images,
)


def test_unreadable_files_are_named_once_and_images_are_those_of_all_ranks():
    run = fake_run()
    run.loader.bad = ("a.png: cut short",)
    run.processes = SimpleNamespace(gather=lambda value: [value, (2, ["b.png: cut short"])])
    left_out = []
    run.loader.leave_out = left_out.extend
    assert count_images(run, 3) == 5
    assert left_out == ["a.png: cut short", "b.png: cut short"]
    assert run.done == [("event", "a.png: cut short; the image is skipped")]
    assert count_images(run, 3) == 5 and len(run.done) == 1


def test_a_streak_without_images_ends_the_run_and_remembers_where_it_started():
    run = fake_run()
    start = run.state.step
    for _ in range(MOST_UNREAD):
        check_readable(run, 0)
        run.state.step += 1
    assert run.health.before_unread.step == start
    with pytest.raises(UserError, match=f"of the last {MOST_UNREAD} steps no image could be read"):
        check_readable(run, 0)
    check_readable(run, 1)
    assert run.health.before_unread is None


def test_skipped_steps_are_reported_and_end_the_run_when_none_has_changed_anything_for_long():
    run = fake_run()
    check_progress(run, 2)
    assert "the gradients of 2 of the last 5 steps were not finite" in run.done[0][1]
    assert (run.state.skipped, run.state.last_report, run.state.last_finite) == (2, 5, 5)
    run.health.latest = [(["a.png"], torch.tensor([7]))]
    run.state.step += MOST_SKIPPED - 1
    check_progress(run, 2 + MOST_SKIPPED - 1)
    run.state.step += 1
    with pytest.raises(UserError, match=r"since step 5 .*a\.png at 7"):
        check_progress(run, 2 + MOST_SKIPPED)


def test_a_step_made_in_part_is_never_saved():
    run = fake_run({"unet": {"rate": 1.0, "not finite": torch.tensor(0)}}, fused=True)
    check_gradients(run)
    assert not run.learner.optimizers.updating
    run = fake_run({"unet": {"rate": 1.0, "not finite": torch.tensor(3)}}, fused=True)
    with pytest.raises(UserError, match="3 of the unet"):
        check_gradients(run)
    assert run.learner.optimizers.updating


def test_ranks_that_differ_end_the_run_and_nothing_is_saved():
    run = fake_run({"unet": {"rate": 1.0, "d": torch.tensor(2.0)}})
    compared = {}
    run.processes = SimpleNamespace(count=2, difference=lambda numbers: compared.update(numbers))
    check_ranks(run)
    assert compared == {
        "the step": 5,
        "the epoch": 1,
        "the images": 0,
        "d of the unet": 2.0,
        "rate of the unet": 1.0,
    }
    run.processes.difference = lambda numbers: "d of the unet is 2.0 in process 0 and 3.0 in process 1"
    with pytest.raises(UserError, match="no longer train the same model"):
        check_ranks(run)
    assert run.learner.optimizers.updating
