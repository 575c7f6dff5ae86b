"""Loggers of a run's numbers, images and texts, with four methods each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from PIL import Image

from trainer.reporting.jsonl import JsonlLogger
from trainer.reporting.tensorboard import TensorBoardLogger
from trainer.reporting.wandb import WandbLogger


class Logger(Protocol):
    """Records a run. Step 0 is before the first optimizer step; tags are full names, as loss/log_step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        ...

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Record an image."""
        ...

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text verbatim."""
        ...

    def close(self) -> None:
        """Flush; further calls do nothing."""
        ...


class Loggers:
    """Several loggers as one, called in this order."""

    def __init__(self, members: Sequence[Logger]) -> None:
        self._members = tuple(members)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        for member in self._members:
            member.scalars(values, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Record an image."""
        for member in self._members:
            member.image(tag, image, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text verbatim."""
        for member in self._members:
            member.text(tag, text, step)

    def close(self) -> None:
        """Close every member, even after one fails."""
        with ExitStack() as stack:
            for member in self._members:
                stack.callback(member.close)


def open_loggers(
    folder: Path,
    *,
    warn: Callable[[str], None],
    networks: Sequence[str],
    adaptive: Collection[str],
    first_step: int | None = None,
    last_report: int = 0,
    wandb_project: str | None = None,
    branch: int = 0,
) -> Loggers:
    """Open the loggers of a run in its folder.

    Args:
        warn: called with one sentence when recording fails; training continues.
        networks: the trained networks, as their tags name them.
        adaptive: those of them with a learned rate d.
        first_step: the first step of a resumed run, from which earlier records are hidden.
        last_report: the last step before it with a report.
        wandb_project: None for no Weights & Biases.
        branch: how often the run has gone back to an older checkpoint.

    Raises:
        UserError: the folder cannot be written to, or Weights & Biases not be reached.
    """
    members: list[Logger] = [
        TensorBoardLogger(folder, warn=warn, networks=networks, adaptive=adaptive, purge_step=first_step),
        JsonlLogger(folder, warn=warn, purge_step=first_step, last_report=last_report),
    ]
    if wandb_project is not None:
        members.append(WandbLogger(folder, project=wandb_project, warn=warn, branch=branch))
    return Loggers(members)
