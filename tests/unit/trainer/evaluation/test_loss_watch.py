"""What is said of losses, and when it is not."""

import json
import math

import pytest

from trainer.evaluation.loss_watch import LossWatch


def follow(rows, watch=None, first=0):
    """Return the warnings about (fixed, validation, training) at steps 0, 10, ..."""
    watch = watch or LossWatch(("unet",))
    said = []
    for number, (fixed, validation, training) in enumerate(rows, first):
        if training is not None:
            watch.trained(training)
        said += watch.update(
            step=10 * number,
            fixed=fixed,
            validation=validation,
            rates={"unet": 1e-6 * (number + 1), "text encoder": 1e-6},
        )
    return said


OVERFITTING = [
    (1.0, 1.0, 1.0),
    (0.9, 0.8, 0.9),
    (0.8, 0.85, 0.8),
    (0.7, 0.9, 0.7),
    (0.6, 0.95, 0.6),
    (0.5, 1.0, 0.5),
]
TOO_HIGH = [
    (1.0, None, 1.0),
    (0.5, None, 0.6),
    (0.6, None, 0.8),
    (0.7, None, 0.9),
    (0.8, None, 1.0),
    (0.9, None, 1.1),
]


def test_validation_up_while_training_falls_is_told_once_with_its_beginning():
    watch = LossWatch()
    assert follow(OVERFITTING[:4], watch) == [] and watch.overfitting_since is None
    [sentence] = follow(OVERFITTING[4:], watch, first=4)
    assert sentence == (
        "step 40: the validation loss has been above its 0.8000 of step 10 for 3 "
        "evaluations (0.9500 now), while that of training images "
        "fell from 0.9000 to 0.6000: possible overfitting since step 10; compare the samples."
    )
    assert (watch.overfitting_since, watch.best) == (10, 10)


def test_both_up_names_the_rates_then_and_now():
    [sentence] = follow(TOO_HIGH)
    assert sentence == (
        "step 40: the loss of training batches (0.8000 to 0.9000) and the fixed-noise loss (0.5000 to "
        "0.8000) have both risen since step 10: the rate may be too high (d*lr of the unet 2e-06 then and "
        "5e-06 now, lr of the text encoder 1e-06 then and 1e-06 now); compare the samples."
    )


@pytest.mark.parametrize(
    "rows",
    [
        [(1 - i / 10, 1 - i / 10, 1 - i / 10) for i in range(8)],
        [
            (1.0, 1.0, 1.0),
            (0.9, 0.8, 0.9),
            (0.8, 0.9, 0.9),
            (0.8, 0.9, 0.9),
            (0.8, 0.7, 0.9),
            (0.7, 0.9, 0.9),
            (0.7, 0.8, 0.8),
        ],
        [(0.5 + i / 10, 0.5 + i / 10, 1 - i / 10) for i in range(8)],
        [(None, 0.5 + i / 10, None) for i in range(8)],
        [(0.5 + i / 10, None, None) for i in range(8)],
    ],
    ids=[
        "all fall",
        "a new low in between",
        "fixed and validation up, batches down",
        "no training loss",
        "no batches",
    ],
)
def test_nothing_is_said_without_both_signs(rows):
    assert follow(rows) == []


def test_a_second_rise_after_a_new_low_is_told_again():
    again = [(0.4, 0.5, 0.4), (0.3, 0.6, 0.3), (0.2, 0.6, 0.2), (0.1, 0.6, 0.1)]
    watch = LossWatch()
    said = follow([*OVERFITTING, *again], watch)
    assert (
        len(said) == 2 and "possible overfitting since step 60" in said[1] and watch.overfitting_since == 60
    )


def test_values_that_are_not_finite_are_no_low_and_no_mean():
    watch = LossWatch()
    watch.trained(math.nan)
    assert follow([(math.nan, math.nan, None), *OVERFITTING], watch) == follow(
        [(1.0, 1.0, 1.0), *OVERFITTING]
    )


@pytest.mark.parametrize("rows", [OVERFITTING, TOO_HIGH])
@pytest.mark.parametrize("cut", range(1, 6))
def test_a_continued_run_says_what_an_unbroken_one_would_have(rows, cut):
    watch, continued = LossWatch(("unet",)), LossWatch(("unet",))
    said = follow(rows[:cut], watch)
    continued.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert said + follow(rows[cut:], continued, first=cut) == follow(rows)
    assert continued.state_dict() == follow_state(rows)


def test_a_run_that_goes_on_with_other_held_out_images_forgets_their_loss():
    watch = LossWatch(held_out="a")
    follow(OVERFITTING, watch)
    same, other = LossWatch(held_out="a"), LossWatch(held_out="b")
    for continued in (same, other):
        continued.load_state_dict(watch.state_dict())
    assert (same.best, other.best) == (10, None)


def follow_state(rows):
    watch = LossWatch(("unet",))
    follow(rows, watch)
    return watch.state_dict()
