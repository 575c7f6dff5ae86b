"""Sample pictures while training: prompts from a file or from the data, fixed seeds, grids with captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which pictures are drawn while training, and how often."""

    sample_prompts: str | None = None
    """A .txt file with one prompt a line, or a .json file with prompts, seeds, cfg scales and more; null takes four captions of the data."""

    sample_steps: Annotated[int, Ge(1)] = 250
    """Draw samples every n optimizer steps, besides before the first and after the last."""
