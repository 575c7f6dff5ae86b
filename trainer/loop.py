"""Epochs of steps, and what is due after each: report, sample, validate, save, stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long a run lasts and what makes it repeatable."""

    max_epochs: Annotated[int, Ge(1)] = 300
    """How many times every image is trained."""

    grad_accum: Annotated[int, Ge(1)] = 1
    """Batches that are averaged into one optimizer step."""

    seed: Annotated[int, Ge(-1)] = 555
    """The seed of everything random; -1 draws one, logs it and saves it."""

    stop_after_steps: Annotated[int, Ge(1)] | None = None
    """Save a checkpoint and stop with exit code 0 when the run has made this many optimizer steps in all, counted from its beginning."""

    gpuid: Annotated[int, Ge(0)] = 0
    """Which CUDA device to train on."""
