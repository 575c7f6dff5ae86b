"""SGD with D-Adaptation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import dadaptation


class DAdaptSGD(dadaptation.DAdaptSGD):
    """The dadaptation library's DAdaptSGD, without its divisions by zero.

    The library divides by the norm of the first gradient and by |s|, the length of the sum of all. This one
    changes nothing, neither weights nor d nor k, while all gradients have been 0 or missing, and in a step
    whose gradients are all missing or of parameters that have had none but 0. It also changes nothing at
    rate 0, with which every warm-up starts, instead of averaging on.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["g0_norm"] = 0.0  # which the library adds in its first step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient, their state, and d; return what `closure` returned."""
        loss = None if closure is None else closure()
        if any(group["lr"] > 0 for group in self.param_groups):
            # The error comes before anything is written but the starting point and s = 0.
            with suppress(ZeroDivisionError):
                super().step()
        return loss
