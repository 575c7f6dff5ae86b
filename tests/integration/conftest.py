"""Fixtures of whole runs."""

import pytest

from tests.runs import model, no_estimate, workplace
from trainer.reporting.curves import Curves

__all__ = ["model", "no_estimate", "workplace"]

BEGUN = Curves.begun


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Leave the picture of curves out of checkpoints: drawing takes longer than a tiny model's step."""
    monkeypatch.setattr(Curves, "begun", False)


@pytest.fixture
def drawn_curves(no_curves, monkeypatch):
    """Draw it all the same."""
    monkeypatch.setattr(Curves, "begun", BEGUN)
