"""Weights & Biases, on request by `wandb: true`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.errors import UserError, said

RUN_ID = "wandb-id{}.txt"
"""The file in a run's folder with its id on Weights & Biases, or the id of a branch."""


class WandbLogger:
    """Record numbers and images in a run's history on Weights & Biases, and texts in its configuration.

    A resumed run is the same run there. W&B ignores steps that are not in rising order, so steps between a
    checkpoint and a crash keep their first record, and a run that goes back to an older checkpoint is another
    run there.

    Args:
        folder: the run's, whose name is the run's name; W&B's own files go into its subfolder wandb.
        branch: how often the run has gone back.
        warn: called with one sentence when recording fails; training continues.

    Raises:
        UserError: the package is missing, or the run cannot be started there.
    """

    def __init__(self, folder: Path, *, project: str, warn: Callable[[str], None], branch: int = 0) -> None:
        self._warn = warn
        self._warned = self._closed = False
        suffix = f"-branch{branch}" if branch else ""
        id_file = folder / RUN_ID.format(suffix)
        identity = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else secrets.token_hex(8)
        try:
            import wandb  # an optional package

            self._wandb: Any = wandb
            self._run: Any = wandb.init(
                project=project,
                name=folder.name + suffix,
                id=identity,
                dir=folder,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),  # the run has its own console
                reinit="create_new",
            )
        except Exception as error:  # a service or a network raises anything
            raise UserError(
                f"wandb: no run can be started on Weights & Biases ({said(error)[:200]}); log in with wandb "
                "login, set the environment variable WANDB_MODE to offline, or set wandb to false."
            ) from error
        id_file.write_text(identity + "\n", encoding="utf-8")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        self._try(lambda: self._run.log(dict(values), step=step))

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Record an image."""
        self._try(lambda: self._run.log({tag: self._wandb.Image(image)}, step=step))

    def text(self, tag: str, text: str, step: int) -> None:
        """Record a text in the run's configuration, JSON as keys that runs can be compared by."""
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        self._try(lambda: self._run.config.update({tag: value}, allow_val_change=True))

    def close(self) -> None:
        """Flush and end the run there; further calls do nothing."""
        self._try(self._run.finish)
        self._closed = True

    def _try(self, act: Callable[[], Any]) -> None:
        if self._closed:
            return
        try:
            act()
        except Exception as error:  # a failing service must not end a run
            if not self._warned:
                self._warned = True
                reason = said(error)[:200]
                self._warn(f"Weights & Biases has not taken everything ({reason}); training continues")
