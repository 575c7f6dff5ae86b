"""The options of checkpoints; imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """Time, place and form of checkpoints."""

    save_every_n_epochs: Annotated[int, Ge(1)] | None = None
    """Save a checkpoint after every n-th epoch; null saves at the end only."""

    save_ckpts_from_n_epochs: Annotated[int, Ge(0)] = 0
    """Let save_every_n_epochs save no checkpoint before this epoch."""

    ckpt_every_n_minutes: Annotated[float, Gt(0)] | None = None
    """Save a checkpoint after the first step that ends n minutes or more after the last one was saved."""

    save_ckpt_dir: str | None = None
    """A folder for the single-file .safetensors instead of the run's own ckpts folder."""

    save_format: Literal["both", "diffusers", "single"] = "both"
    """Form of a checkpoint: a diffusers folder in training precision, a single .safetensors in the
    original layout, or both; with single, folders are kept for resuming only, beside the newest files (see
    keep_resume_n)."""

    no_save_ckpt: bool = False
    """Do not write the single file; the same as save_format: diffusers."""

    no_prepend_last: bool = False
    """Name the checkpoint at the end of a run like all others, without last- before it."""

    save_full_precision: bool = False
    """Write the single file in fp32 instead of fp16."""

    save_optimizer: bool = False
    """Keep the optimizer state of every checkpoint, not only of the newest."""

    keep_resume_n: Annotated[int, Ge(1)] = 2
    """Number of newest checkpoints that keep their resume state; with two, a damaged one costs the steps
    since the other."""

    keep_last_n: Annotated[int, Ge(1)] | None = None
    """Keep the newest n checkpoints of the run and delete older ones after each save; null keeps all."""

    keep_best: bool = False
    """Also save a checkpoint, best-..., whenever the validation loss is lower than ever, in the place of the
    one before it; what is saved on schedule stays. Needs validation_config."""

    @property
    def writes_single(self) -> bool:
        """True if a checkpoint has a single file."""
        return self.save_format != "diffusers" and not self.no_save_ckpt
