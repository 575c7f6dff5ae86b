"""What is said of a course of d, and that it is said once."""

import pytest

from trainer.config.schema import keys_of, optimizer_classes
from trainer.optim import DAdaptAdamOptions
from trainer.optim.watch import PATIENCE, AdaptationWatch


def told(course, *, every=10, network="unet", watch=None):
    """Return (step, sentence) for a course: a function from the step to (d, d_hat)."""
    watch = watch or AdaptationWatch({"unet": DAdaptAdamOptions()}, {"unet": "base"})
    return [
        (step, sentence)
        for step in range(every, 501, every)
        for sentence in watch.look(network, step=step, d=course(step)[0], d_hat=course(step)[1])
    ]


def test_a_healthy_course_is_silent():
    assert told(lambda step: (1e-6 * min(1.05**step, 300), 1e-6 * min(1.05**step, 300))) == []


def test_d_that_never_left_its_start():
    ((step, sentence),) = told(lambda step: (1e-6, 5e-7))
    assert step == PATIENCE
    for part in ("unet", "has not left d0 (1e-06)", "base.lr", "base.d0"):
        assert part in sentence


def test_a_late_start_is_not_told():
    assert told(lambda step: (1e-6 if step < PATIENCE - 5 else 5e-6, 1e-6)) == []


def test_d_hat_below_zero():
    ((step, sentence),) = told(lambda step: (1e-5, 1e-6 if step < 200 else -1e-6))
    assert step == 200 + PATIENCE and "since step 200" in sentence and "base.lr" in sentence


def test_d_hat_that_comes_back_is_not_told():
    assert told(lambda step: (1e-5, -1e-6 if step % 50 else 1e-6)) == []


def away(step):
    return (1e-5 if step < 300 else 1e-5 * 1.05 ** (step - 300), 1.0)


def test_d_that_runs_away_after_a_rest():
    ((step, sentence),) = told(away)
    assert 340 <= step <= 360 and "1e-05" in sentence
    named = [sentence.index(f"base.{key}") for key in ("rate_max", "d_max", "growth_rate")]
    assert named == sorted(named), "the remedy of the documentation comes first"


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"lr": 0.1}, "1e-06"),
        ({"lr": 0.1, "layer_scale": 3.0}, "3e-06"),
        ({"lr": 0.1, "rate_max": 2e-6}, "1e-06"),  # the rate has doubled
        ({"lr": 0.1, "rate_max": 1e-6}, None),
    ],
)
def test_the_rate_max_that_is_named_is_the_rate_from_before_the_rise(options, rate):
    watch = AdaptationWatch({"unet": DAdaptAdamOptions(**options)}, {"unet": "base"})
    sentences = [sentence for _, sentence in told(away, watch=watch)]
    if rate is None:
        assert sentences == [], "rate_max held the rate before the rise and after it"
    else:
        assert f"with base.rate_max {rate} or" in sentences[0]


@pytest.mark.parametrize("name", [name for name, options in optimizer_classes().items() if options.adapts])
def test_the_brakes_that_are_named_are_keys_of_the_optimizer(name):
    options = optimizer_classes()[name]
    watch = AdaptationWatch({"unet": options(d0=1e-7)}, {"unet": "base"})
    ((_, sentence),) = told(away, watch=watch)
    for key in ("rate_max", "d_max", "growth_rate"):
        assert (f"base.{key}" in sentence) == (key in keys_of(options))
    assert "base." in sentence


@pytest.mark.parametrize("stop", [50, 150, 250])
def test_a_continued_run_says_the_rest(stop):
    def course(step):
        return (1e-5 if step < 300 else 2e-4, -1.0 if 40 < step < 280 else 1.0)

    whole = told(course)
    assert len(whole) == 2
    first = AdaptationWatch({"unet": DAdaptAdamOptions()}, {"unet": "base"})
    said = [
        (s, t)
        for s in range(10, stop + 1, 10)
        for t in first.look("unet", step=s, d=course(s)[0], d_hat=course(s)[1])
    ]
    second = AdaptationWatch({"unet": DAdaptAdamOptions()}, {"unet": "base"})
    second.load_state_dict(first.state_dict())
    said += [
        (s, t)
        for s in range(stop + 10, 501, 10)
        for t in second.look("unet", step=s, d=course(s)[0], d_hat=course(s)[1])
    ]
    assert said == whole


def settled(course, last=300, **options):
    """Return how settled d is said to be after reports of steps 1, 10, 20 ... and an end at `last`."""
    watch = AdaptationWatch({"unet": DAdaptAdamOptions(**options)}, {"unet": "base"})
    for step in (1, *range(10, last, 10)):
        watch.look("unet", step=step, d=course(step), d_hat=0.0)
    return watch.settled("unet", step=last, d=course(last))


@pytest.mark.parametrize(
    ("course", "last", "expected"),
    [
        (lambda step: 1e-6 * min(1.05**step, 300), 300, "settled, d grew by 0.0% over the last 100 steps"),
        (lambda step: 1e-5 * (1 + 4e-5 * step), 300, "settled, d grew by 0.4% over the last 100 steps"),
        (lambda step: 1e-5 * 1.005**step, 300, "still rising, d grew by 64.7% over the last 100 steps"),
        (lambda step: 1e-5 if step <= 200 else 2e-5, 300,
         "still rising, d is 2 times as large over the last 100 steps"),
        (lambda step: 1e-5 if step <= 200 else 2e-5, 310, "settled, d grew by 0.0% over the last 100 steps"),
        (lambda step: 1e-6 * step, 104, "still rising, d is 104 times as large over the last 103 steps"),
        (lambda step: 1e-5, 90, "too early to tell whether d has settled, after 90 of 100 steps"),
    ],
)  # fmt: skip
def test_how_settled_d_is(course, last, expected):
    assert settled(course, last) == expected


def test_d_that_d_max_holds_was_chosen():
    assert settled(lambda step: 1e-5, d_max=1e-5).startswith("held by base.d_max (1e-05)")
    assert settled(lambda step: 9.9e-6, d_max=1e-5).startswith("settled")


def test_a_continued_run_judges_as_a_whole_one():
    def looks(watch, steps):
        for step in steps:
            watch.look("unet", step=step, d=min(1e-7 * step, 1e-5), d_hat=0.0)

    for last in (190, 200, 210):
        first, second = (
            AdaptationWatch({"unet": DAdaptAdamOptions(d0=1e-8)}, {"unet": "base"}) for _ in range(2)
        )
        looks(first, range(10, 151, 10))
        second.load_state_dict(first.state_dict())
        looks(second, range(160, last + 1, 10))
        assert second.settled("unet", step=last, d=1e-5).startswith("settled, ") == (last >= 200)
