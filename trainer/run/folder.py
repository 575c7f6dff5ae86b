"""The run folder: made, locked, marked and filled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

from data.atomic import appearing, remove, tidy
from trainer.checkpoints.artifact import Artifact
from trainer.checkpoints.export import copy_beside
from trainer.checkpoints.format import TrainState
from trainer.checkpoints.lock import locked
from trainer.checkpoints.run_folder import mark
from trainer.config import TrainConfig, write_resolved
from trainer.errors import UserError
from trainer.models.pipeline import Models
from trainer.planning.plan import Plan, run_name
from trainer.reporting.console import Console
from trainer.reporting.curves import Curves
from trainer.reporting.loggers import Loggers, open_loggers


def make_folder(config: TrainConfig) -> Path:
    """Make the run folder, `{logdir}/{name}-{timestamp}`."""
    logdir = Path(config.logging.logdir)
    while True:
        folder = logdir / f"{run_name(config)}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            folder.mkdir(parents=True)
            return folder.resolve()
        except FileExistsError:
            time.sleep(0.2)  # another run started in the same second
        except OSError as error:
            raise UserError(
                f"logdir: no run folder can be made in {logdir} ({error.strerror}); choose another logdir."
            ) from error


def open_folder(
    folder: Path,
    plan: Plan,
    artifact: Artifact,
    state: TrainState,
    console: Console,
    ending: ExitStack,
    *,
    adaptive: Sequence[str],
    curves: Curves,
) -> Loggers:
    """Lock and mark a run folder, open its loggers and record the configuration in it.

    `ending` takes what must be done at the end; networks in `adaptive` are trained by D-Adaptation.
    """
    ending.callback(_drop_unstarted, folder, state)
    ending.enter_context(locked(folder))
    mark(folder)  # also a run that is older than the marker
    tidy(folder / "ckpts")
    logging = plan.config.logging
    recorders = open_loggers(
        folder,
        warn=console.event,
        networks=[network for network, part in plan.counts.items() if part.trained],
        adaptive=adaptive,
        first_step=state.step + 1 if plan.start.run else None,
        last_report=state.last_report,
        wandb_project=logging.project_name if logging.wandb else None,
        branch=plan.start.branch,
    )
    loggers = Loggers([recorders, curves])
    ending.callback(loggers.close)
    write_resolved(plan.config, folder)
    artifact.keep_base(folder)
    for name in ("train.json", "optimizer.json"):
        loggers.text(f"config/{name}", (folder / name).read_text(encoding="utf-8"), state.step)
    console.record_to(folder / "run.log")
    return loggers


def keep_beside(models: Models, folder: Path) -> list[str]:
    """Copy the base's further parts, such as a safety checker, into the run folder for every checkpoint.

    The base may be a checkpoint that this run deletes, and hard links are only guaranteed to work inside one
    directory. Returns a note if the parts cannot be copied; checkpoints are without them then.
    """
    place = folder / "base"
    if not models.beside:
        return []
    names = " and ".join(models.beside)
    try:
        if not place.is_dir():
            with appearing(place) as draft:
                copy_beside(models, draft)
    except OSError as error:
        models.beside = {}
        return [
            f"the base's {names} could not be copied ({error.strerror or error}), so checkpoints are without"
        ]
    models.beside_from = place
    return []


def _drop_unstarted(folder: Path, state: TrainState) -> None:
    """Delete the folder of a run that ended before its first step."""
    if state.step == 0:
        with suppress(OSError):
            remove(folder)
