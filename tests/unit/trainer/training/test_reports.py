"""A report: read once, recorded, shown, and the checks that follow it."""

from types import SimpleNamespace

import pytest
import torch

from tests.unit.trainer.training.fake import add_loss, fake_run
from trainer.reporting.tags import LOSS, NOT_FINITE
from trainer.training.reports import report


def numbers_of(run):
    return next(entry[1] for entry in run.done if entry[0] == "scalars")


def test_numbers_are_recorded_under_their_tags_and_shown():
    run = fake_run(
        {"unet": {"rate": 2e-4, "d": torch.tensor(1e-3), "d_hat": torch.tensor(2e-3), "decayed": 0.5}}
    )
    add_loss(run, 0.75)
    report(run)
    numbers = numbers_of(run)
    assert {tag: numbers[tag] for tag in numbers if tag.startswith(("loss", "lr/", "optimizer/d"))} == {
        LOSS: 0.75,
        "lr/unet": 2e-4,
        "optimizer/d unet": pytest.approx(1e-3),
        "optimizer/d_hat unet": pytest.approx(2e-3),
        "optimizer/decay so far unet": 0.5,
    }
    assert numbers["performance/ram"] > 0
    shown = next(entry[1] for entry in run.done if entry[0] == "report")
    assert shown.loss == 0.75 and shown.rates == {"unet": 2e-4}
    assert ("trained", 0.75) in run.done


def test_what_d_does_is_said_in_sentences():
    measures = {"unet": {"rate": 2e-4, "d": torch.tensor(1e-3), "d_hat": torch.tensor(2e-3), "decayed": 0.0}}
    run = fake_run(measures)

    def say(network, *, step, d, d_hat):
        return [f"{network} {step} {d:g} {d_hat:g}"]

    run.records.watch = SimpleNamespace(networks=("unet",), look=say, update=say)
    add_loss(run)
    report(run)
    assert ("event", "unet 5 0.001 0.002") in run.done


def test_gradients_that_were_not_finite_are_counted():
    run = fake_run({"unet": {"rate": 1.0, "not finite": torch.tensor(0)}})
    add_loss(run)
    report(run)
    assert numbers_of(run)[f"{NOT_FINITE}unet"] == 0.0
