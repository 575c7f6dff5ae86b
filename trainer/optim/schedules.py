"""Learning rate over optimizer steps, as a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

SchedulerName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The learning rate and its course, shared by every optimizer."""

    lr: Annotated[float, Ge(0)] | None = None
    """Learning rate; for D-Adaptation a multiplier of the rate it finds, 1.0 being the method's own (null: 1.0). Elsewhere null
    takes train.json's lr."""

    lr_scheduler: SchedulerName | None = None
    """The course of the rate, by diffusers' names; null takes train.json's, and constant without one."""

    lr_warmup_steps: Annotated[int, Ge(0)] | None = None
    """Optimizer steps over which the rate rises from 0; null is a fiftieth of lr_decay_steps, 0 none; constant ignores it."""

    lr_decay_steps: Annotated[int, Ge(0)] | None = None
    """Optimizer steps over which the rate falls; null is 1.5 times the steps of the run; constant ignores it."""


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """The learning rate for optimizer sections that leave theirs null (train.json)."""

    lr: Annotated[float, Ge(0)] | None = None
    """Learning rate where the optimizer file has none; D-Adaptation never takes it."""

    lr_scheduler: SchedulerName = "constant"
    """The course of the rate where the optimizer file has none."""

    lr_warmup_steps: Annotated[int, Ge(0)] | None = None
    """Warm-up steps where the optimizer file has none."""

    lr_decay_steps: Annotated[int, Ge(0)] | None = None
    """Decay steps where the optimizer file has none; null or 0 is 1.5 times the steps of the run."""

    allow_high_lr: bool = False
    """Allow AdamW rates above 1e-5 on networks of more than 500 million parameters, which usually ruin Stable Diffusion."""
