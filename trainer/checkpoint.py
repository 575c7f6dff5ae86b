"""Checkpoints: whole or absent, and everything needed to go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """When checkpoints are written, where, and in which form."""

    save_every_n_epochs: Annotated[int, Ge(1)] | None = None
    """Save a checkpoint after every n-th epoch; null saves at the end only."""

    save_ckpts_from_n_epochs: Annotated[int, Ge(0)] = 0
    """Save no checkpoint before this epoch."""

    save_ckpt_dir: str | None = None
    """A folder for the single-file .safetensors instead of the run's own ckpts folder."""

    save_format: Literal["both", "diffusers", "single"] = "both"
    """What a checkpoint consists of: a diffusers folder in training precision, a single .safetensors in the original layout, or both."""

    no_save_ckpt: bool = False
    """Do not write the single file; the same as save_format: diffusers."""

    save_full_precision: bool = False
    """Write the single file in fp32 instead of fp16."""

    save_optimizer: bool = False
    """Keep the optimizer state of every checkpoint, not only of the newest."""

    keep_resume_n: Annotated[int, Ge(1)] = 1
    """How many of the newest checkpoints keep the state that resuming needs."""
