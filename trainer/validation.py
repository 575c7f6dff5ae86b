"""Losses that can be compared over time: the same images, noise and timesteps at every evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class FixedLossOptions:
    """The fixed-noise loss, logged as loss/stabilize-train from step 0."""

    fixed_loss_images: Annotated[int, Ge(0)] = 16
    """How many training images the fixed-noise loss is measured on, each at 4 timesteps; 0 turns it off."""
