"""Warnings about possible overfitting and a high learning rate, from losses comparable over time.

Neither warning is a verdict. In the experiment behind this program, the checkpoint after a rise of the loss
drew the better samples, so both ask to compare samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.state_file import as_kind

PATIENCE = 3
"""Evaluations in a row above the lowest value that make it significant."""


@dataclass
class _Low:
    """The lowest value of a loss, and the other measurements of that step."""

    step: int
    loss: float
    fixed: float = math.nan
    training: float = math.nan
    rates: dict[str, float] = field(default_factory=dict)
    above: int = 0
    """Evaluations since, all of them above it."""
    told: bool = False
    """The warning about this low was given."""


class LossWatch:
    """Follow the losses of a run's evaluations.

    Args:
        adaptive: networks with a learned rate, named d*lr in warnings.
        held_out: hash of the validation images; with other images a resumed run drops its lowest loss.
    """

    def __init__(self, adaptive: tuple[str, ...] = (), held_out: str = "") -> None:
        self._adaptive = adaptive
        self._held_out = held_out
        self._validation: _Low | None = None
        self._fixed: _Low | None = None
        self._batches: list[float] = []
        self._means: list[float] = []

    @property
    def overfitting_since(self) -> int | None:
        """The step since which the run seems to overfit."""
        low = self._validation
        return low.step if low is not None and low.told else None

    @property
    def best(self) -> int | None:
        """The step of the lowest validation loss."""
        return None if self._validation is None else self._validation.step

    def trained(self, loss: float) -> None:
        """Add the mean loss of the training batches since the last report."""
        if math.isfinite(loss):
            self._batches.append(loss)

    def update(
        self, *, step: int, fixed: float | None, validation: float | None, rates: Mapping[str, float]
    ) -> list[str]:
        """Add an evaluation's losses, if measured, and effective learning rates; return new warnings."""
        if self._batches:
            self._means = [*self._means, sum(self._batches) / len(self._batches)][-PATIENCE:]
            self._batches = []
        training = sum(self._means) / len(self._means) if self._means else math.nan
        now = {"step": step, "training": training, "rates": dict(rates)}
        fixed = math.nan if fixed is None else fixed
        warnings: list[str] = []
        if validation is not None:
            self._validation = low = _follow(self._validation, _Low(loss=validation, fixed=fixed, **now))
            if low.above >= PATIENCE and not low.told and fixed < low.fixed:
                low.told = True
                warnings.append(
                    f"step {step}: the validation loss has been above its {low.loss:.4f} of step {low.step} "
                    f"for {low.above} evaluations ({validation:.4f} now), while that of training images fell "
                    f"from {low.fixed:.4f} to {fixed:.4f}: possible overfitting since step {low.step}; "
                    "compare the samples."
                )
        if not math.isnan(fixed):
            self._fixed = low = _follow(self._fixed, _Low(loss=fixed, fixed=fixed, **now))
            if low.above >= PATIENCE and not low.told and training > low.training:
                low.told = True
                warnings.append(
                    f"step {step}: the loss of training batches ({low.training:.4f} to {training:.4f}) and "
                    f"the fixed-noise loss ({low.loss:.4f} to {fixed:.4f}) have both risen since step "
                    f"{low.step}: the rate may be too high ({self._rates(low.rates, rates)}); "
                    "compare the samples."
                )
        return warnings

    def _rates(self, then: Mapping[str, float], now: Mapping[str, float]) -> str:
        texts = []
        for network, rate in now.items():
            name = "d*lr" if network in self._adaptive else "lr"
            texts.append(f"{name} of the {network} {then.get(network, math.nan):.2g} then and {rate:.2g} now")
        return ", ".join(texts)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, so that a resumed run gives the warnings of an uninterrupted one."""
        return {
            "held_out": self._held_out,
            "validation": self._validation and asdict(self._validation),
            "fixed": self._fixed and asdict(self._fixed),
            "batches": list(self._batches),
            "means": list(self._means),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        same_images = state["held_out"] == self._held_out
        validation, fixed = state["validation"], state["fixed"]
        self._validation = as_kind(_Low, validation) if validation and same_images else None
        self._fixed = as_kind(_Low, fixed) if fixed else None
        self._batches = as_kind(list[float], state["batches"])
        self._means = as_kind(list[float], state["means"])


def _follow(low: _Low | None, now: _Low) -> _Low:
    """Return the lowest so far: `now`, or `low` with one more evaluation above it. NaN is above."""
    if low is None or now.loss < low.loss or not math.isfinite(low.loss):
        return now
    low.above += 1
    return low
