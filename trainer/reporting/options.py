"""Options of reporting: the records of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, MinLen


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """The names and folders of a run's records, and how often numbers are reported."""

    project_name: Annotated[str, MinLen(1)] = "myproj"
    """The project's name, the first part of the run folder's and every checkpoint's name."""

    run_name: str | None = None
    """A name after the project's in the run folder's name; null omits it."""

    logdir: str = "logs"
    """The folder that holds the run folders."""

    log_step: Annotated[int, Ge(1)] = 25
    """Report losses, learning rates and speed every n optimizer steps, and after the first."""

    wandb: bool = False
    """Record the run on Weights & Biases too, in the project of project_name. Needs the package wandb, and
    either a login or WANDB_MODE=offline, which keeps the record in the run's folder until wandb sync sends
    it."""
