"""Where a run's numbers, pictures and texts go: every recorder has the same four methods."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainer.reporting.jsonl import JsonlLogger
from trainer.reporting.tensorboard import TensorBoardLogger
from trainer.reporting.wandb import WandbLogger

if TYPE_CHECKING:
    from PIL import Image


class Logger(Protocol):
    """A place that records a run. Steps are optimizer steps, 0 being before the first; tags are full names, such as loss/log_step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        ...

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Record a picture."""
        ...

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text, shown as it is, every space and newline kept."""
        ...

    def close(self) -> None:
        """Write out what is left; further calls do nothing."""
        ...


class Loggers:
    """Several recorders as one.

    Args:
        members: each is given everything, in this order.
    """

    def __init__(self, members: Sequence[Logger]) -> None:
        self._members = tuple(members)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        for member in self._members:
            member.scalars(values, step)

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Record a picture."""
        for member in self._members:
            member.image(tag, picture, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text, shown as it is."""
        for member in self._members:
            member.text(tag, text, step)

    def close(self) -> None:
        """Close every member, also where one of them fails."""
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
) -> Loggers:
    """Return the recorders of a run.

    Args:
        folder: the run's folder; TensorBoard's events go straight into it.
        warn: is told, in one sentence, when recording fails; training goes on.
        networks: the trained networks, as their tags name them.
        adaptive: those of them that D-Adaptation trains.
        first_step: when a run is continued, the first step that it records again; what the broken-off run
        recorded from there on is hidden.
        last_report: the last step before it whose numbers were recorded.
        wandb_project: the project on Weights & Biases, None where nothing is recorded there.

    Raises:
        UserError: the folder cannot be written to, or Weights & Biases not be reached.
    """
    members: list[Logger] = [
        TensorBoardLogger(folder, warn=warn, networks=networks, adaptive=adaptive, purge_step=first_step),
        JsonlLogger(folder, warn=warn, purge_step=first_step, last_report=last_report),
    ]
    if wandb_project is not None:
        members.append(WandbLogger(folder, project=wandb_project, warn=warn))
    return Loggers(members)
