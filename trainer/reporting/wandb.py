"""Weights & Biases, where `wandb: true` asks for it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

RUN_ID = "wandb-id.txt"
"""The file in a run's folder that holds its name on Weights & Biases."""


class WandbLogger:
    """Record a run on Weights & Biases: numbers and pictures in its history, texts in its configuration.

    A run that goes on is the same run there. W&B takes steps in rising order and leaves others out, so steps
    between a checkpoint and a crash, which are made once more, stay there as they were made first.

    Args:
        folder: the run's folder; its name is the run's, and W&B's own files go into the folder wandb inside
        it.
        project: the project there.
        warn: is told of trouble in one sentence; training goes on.

    Raises:
        UserError: the package is missing, or a run there cannot be begun.
    """

    def __init__(self, folder: Path, *, project: str, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned = self._closed = False
        named = folder / RUN_ID
        identity = named.read_text(encoding="utf-8").strip() if named.exists() else secrets.token_hex(8)
        try:
            import wandb

            self._wandb: Any = wandb
            settings = wandb.Settings(
                console="off", silent=True
            )  # it would read along, and the run has a console of its own
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=identity,
                dir=folder,
                resume="allow",
                settings=settings,
                reinit="create_new",
            )
        except Exception as error:  # whatever a service or a network fails with
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"wandb: no run can be begun on Weights & Biases ({reason}); log in with wandb login, set the environment variable "
                "WANDB_MODE to offline, or set wandb to false."
            ) from error
        named.write_text(identity + "\n", encoding="utf-8")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        self._try(lambda: self._run.log(dict(values), step=step))

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Record a picture."""
        self._try(lambda: self._run.log({tag: self._wandb.Image(picture)}, step=step))

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text in the run's configuration, where JSON becomes keys that runs can be compared by."""
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        self._try(lambda: self._run.config.update({tag: value}, allow_val_change=True))

    def close(self) -> None:
        """Send what is left and end the run there; further calls do nothing."""
        self._try(self._run.finish)
        self._closed = True

    def _try(self, act: Callable[[], Any]) -> None:
        if self._closed:
            return
        try:
            act()
        except Exception as error:  # a run must not end because a service does
            if not self._warned:
                self._warned = True
                self._warn(
                    f"Weights & Biases has not taken everything ({' '.join(str(error).split())[:200]}); training goes on"
                )
