"""Gradients between backward and step: unscaling, norms, clipping, and whether they are finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """What happens to gradients before the optimizers see them."""

    clip_grad_norm: Annotated[float, Gt(0)] | None = None
    """Scale the gradient of each network down to at most this norm; null does not clip."""
