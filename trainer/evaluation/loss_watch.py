"""Watching losses that can be compared over time: says in words what their curves may mean, and what they do not prove.

Neither sentence is a verdict. In the experiment that this program was made for, the checkpoint after a rise
of the loss drew the better pictures, so both end in looking at them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.state_file import as_kind

PATIENCE = 3
"""Evaluations in a row above the lowest value before that means anything."""


@dataclass
class _Low:
    """The lowest value of a loss, and what else was measured then."""

    step: int
    loss: float
    fixed: float = math.nan
    training: float = math.nan
    rates: dict[str, float] = field(default_factory=dict)
    above: int = 0
    """Evaluations since, all of them above it."""
    told: bool = False


class LossWatch:
    """Follow the losses of a run's evaluations.

    Args:
        adaptive: networks whose optimizer finds its rate, for the sentences.
        held_out: what the validation loss is measured on, as a hash; a continued run that measures it on
        other images begins anew.
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
        """Return the step since which the first sentence holds, None where it does not."""
        low = self._validation
        return low.step if low is not None and low.told else None

    @property
    def best(self) -> int | None:
        """Return the step of the lowest validation loss."""
        return None if self._validation is None else self._validation.step

    def trained(self, loss: float) -> None:
        """Take the mean loss of training batches of the last report."""
        if math.isfinite(loss):
            self._batches.append(loss)

    def update(
        self, *, step: int, fixed: float | None, validation: float | None, rates: Mapping[str, float]
    ) -> list[str]:
        """Return what is to be said after an evaluation; each rise is told once.

        Args:
            step: optimizer steps made so far.
            fixed: the fixed-noise loss of training images, None where it was not measured.
            validation: the loss of held-out images, None where it was not measured.
            rates: by network, the rate that acts.
        """
        if self._batches:
            self._means = [*self._means, sum(self._batches) / len(self._batches)][-PATIENCE:]
            self._batches = []
        training = sum(self._means) / len(self._means) if self._means else math.nan
        now = {"step": step, "training": training, "rates": dict(rates)}
        fixed = math.nan if fixed is None else fixed
        sentences: list[str] = []
        if validation is not None:
            self._validation = low = _follow(self._validation, _Low(loss=validation, fixed=fixed, **now))
            if low.above >= PATIENCE and not low.told and fixed < low.fixed:
                low.told = True
                sentences.append(
                    f"step {step}: the validation loss has been above its {low.loss:.4f} of step {low.step} for {low.above} evaluations "
                    f"({validation:.4f} now), while that of training images fell from {low.fixed:.4f} to {fixed:.4f}: possible overfitting "
                    f"since step {low.step}; compare the pictures."
                )
        if not math.isnan(fixed):
            self._fixed = low = _follow(self._fixed, _Low(loss=fixed, fixed=fixed, **now))
            if low.above >= PATIENCE and not low.told and training > low.training:
                low.told = True
                sentences.append(
                    f"step {step}: the loss of training batches ({low.training:.4f} to {training:.4f}) and the fixed-noise loss "
                    f"({low.loss:.4f} to {fixed:.4f}) have both risen since step {low.step}: the rate may be too high "
                    f"({self._rates(low.rates, rates)}); compare the pictures."
                )
        return sentences

    def _rates(self, then: Mapping[str, float], now: Mapping[str, float]) -> str:
        """Return the rates at the low and now, in words."""
        return ", ".join(
            f"{'d*lr' if network in self._adaptive else 'lr'} of the {network} {then.get(network, math.nan):.2g} then and {rate:.2g} now"
            for network, rate in now.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, so that a continued run says what an unbroken one would have."""
        return {
            "held_out": self._held_out,
            "validation": self._validation and asdict(self._validation),
            "fixed": self._fixed and asdict(self._fixed),
            "batches": list(self._batches),
            "means": list(self._means),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._validation = (
            as_kind(_Low, state["validation"])
            if state["validation"] and state["held_out"] == self._held_out
            else None
        )
        self._fixed = as_kind(_Low, state["fixed"]) if state["fixed"] else None
        self._batches, self._means = (
            as_kind(list[float], state["batches"]),
            as_kind(list[float], state["means"]),
        )


def _follow(low: _Low | None, now: _Low) -> _Low:
    """Return the lowest so far: `now`, or the one before with one more evaluation above it. A loss that is not finite is above."""
    if low is None or now.loss < low.loss or not math.isfinite(low.loss):
        return now
    low.above += 1
    return low
