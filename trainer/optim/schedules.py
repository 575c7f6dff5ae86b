"""Learning-rate schedules, as pure functions of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

if TYPE_CHECKING:
    from torch.optim import Optimizer

SchedulerName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The learning rate and its schedule, shared by every optimizer."""

    lr: Annotated[float, Gt(0)] | None = None
    """Learning rate; for D-Adaptation a multiplier of the rate it finds, 1.0 being the method's own (null:
    1.0). Elsewhere null takes train.json's lr, and 1e-6 without one."""

    lr_scheduler: SchedulerName | None = None
    """Learning-rate schedule, by diffusers' names; null takes train.json's, and constant without one.
    polynomial falls in a straight line to 1e-7, or to a tenth of a rate below 1e-6."""

    lr_warmup_steps: Annotated[int, Ge(0)] | None = None
    """Optimizer steps of warm-up from 0; null: a fiftieth of lr_decay_steps, 0: none; not for constant."""

    lr_decay_steps: Annotated[int, Ge(0)] | None = None
    """Optimizer steps of decay; null or 0: 1.5 times the steps of the run; not for constant."""

    adapts: ClassVar[bool] = False
    """Whether the optimizer finds its own rate, lr being a multiplier of it."""

    learned_keys: ClassVar[tuple[str, ...]] = ()
    """Entries of the optimizer's groups that it changes itself, and that a checkpoint therefore holds."""

    shaped_state: ClassVar[bool] = True
    """True if state tensors of two and more dimensions have the shape of their weight."""

    groups_decay: ClassVar[bool] = True
    """Whether groups of parameters can have weight decays of their own."""

    rounds_bf16: ClassVar[bool] = False
    """Whether bf16 weights learn from steps smaller than their spacing, by stochastic rounding."""

    def learned(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of one of the optimizer's groups that a checkpoint holds."""
        return {key: group[key] for key in self.learned_keys}

    def rate(self, optimizer: Optimizer) -> Any:
        """Return the rate of the coming step, a number or a 0-d device tensor, without a device sync."""
        return optimizer.param_groups[0]["lr"]

    def decay(self, optimizer: Optimizer) -> Any:
        """Return the share of every weight that decoupled weight decay takes in the coming step."""
        return 0.0

    def measure(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the reported numbers, or 0-d tensors, by name: `rate`, the effective learning rate."""
        return {"rate": self.rate(optimizer)}


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """The learning rate for optimizer sections that leave theirs null (train.json)."""

    lr: Annotated[float, Gt(0)] | None = None
    """Learning rate where the optimizer file has none; D-Adaptation never takes it."""

    lr_scheduler: SchedulerName = "constant"
    """Learning-rate schedule where the optimizer file has none."""

    lr_warmup_steps: Annotated[int, Ge(0)] | None = None
    """Warm-up steps where the optimizer file has none."""

    lr_decay_steps: Annotated[int, Ge(0)] | None = None
    """Decay steps where the optimizer file has none; null or 0 is 1.5 times the steps of the run."""

    allow_high_lr: bool = False
    """Allow AdamW rates above 1e-5, which usually ruin networks of more than 500 million parameters."""


def rate_factor(options: ScheduleOptions, total_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate by optimizer step, counted from 0, as diffusers has it."""
    import torch
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

    name = options.lr_scheduler or "constant"
    decay, warmup = _decay_steps(options, total_steps), warmup_steps(options, total_steps)
    dummy = torch.optim.SGD([torch.zeros(1)], lr=options.lr or 1.0)
    if name == "polynomial":  # which diffusers ends at 1e-7 whatever the rate, and refuses for smaller ones
        end, decay = min(1e-7, dummy.defaults["lr"] / 10), max(decay, warmup + 1)
        scheduler: Any = get_polynomial_decay_schedule_with_warmup(dummy, warmup, decay, lr_end=end)
    else:
        scheduler = get_scheduler(name, dummy, num_warmup_steps=warmup, num_training_steps=decay)
    factor = scheduler.lr_lambdas[0]
    return lambda step: float(factor(step))


def warmup_steps(options: ScheduleOptions, total_steps: int) -> int:
    """Return the warm-up steps of a run of `total_steps`."""
    if options.lr_scheduler in (None, "constant"):
        return 0
    return (
        math.ceil(_decay_steps(options, total_steps) / 50)
        if options.lr_warmup_steps is None
        else options.lr_warmup_steps
    )


def _decay_steps(options: ScheduleOptions, total_steps: int) -> int:
    return options.lr_decay_steps or math.ceil(1.5 * total_steps)
