"""The checkpoints of runs: the newest whole one, all in order, and those to delete."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from data.atomic import drop, restore
from trainer.checkpoints.format import (
    BEST,
    BRANCH,
    EMA,
    KIND,
    MANIFEST,
    RESUME,
    RUN,
    STEP,
    is_checkpoint,
    model_problem,
    place_in_run,
    resume_problem,
)
from trainer.checkpoints.lock import is_free
from trainer.checkpoints.options import SaveOptions
from trainer.checkpoints.run_folder import by_timestamp
from trainer.errors import UserError
from trainer.models.tensor_file import read_metadata
from trainer.output import counted

_NUMBER = re.compile(r"[0-9]{1,18}")


def find_last(logdir: Path, project: str, *, weights_only: bool = False) -> tuple[Path, list[str]]:
    """Return the newest whole checkpoint of a project, and problems of newer ones.

    It is the one of the highest step, on the latest branch of the newest run that has one. Runs are ordered
    by the timestamp in their folders' names, never by the file system's times. With `weights_only`, a model
    without resume state will do.
    """
    runs = sorted(
        (path for path in logdir.glob(f"{glob.escape(project)}-*") if path.is_dir()),
        key=by_timestamp,
        reverse=True,
    )
    none = (
        f"findlast found no checkpoint of project {project!r} to resume in {logdir} "
        f"({counted(len(runs), 'run')} looked at)"
    )
    return _newest(
        runs, f"{none}; name a model to start a new run.", weights_only=weights_only, project=project
    )


def newest_of(run: Path, *, weights_only: bool = False) -> tuple[Path, list[str]]:
    """Return a run's newest whole checkpoint, and problems of newer ones."""
    return _newest([run], f"the run {run} holds no checkpoint to resume.", weights_only=weights_only)


def branch_from(folder: Path, run: Path) -> tuple[int, Path | None]:
    """Return the branch of a run that resumes from `folder`, and the newest checkpoint if it starts one.

    Going back to an older checkpoint starts a branch: what it saves is newer than all steps of earlier ones.
    """
    own, found = _place(folder), _folders(run)
    newest = next(iter(found), folder)
    if _place(newest) <= own:
        return own[0], None
    return 1 + max(_place(other)[0] for other in found), newest


def require_resumable(folder: Path) -> None:
    """Refuse a checkpoint without whole resume state; the message names what to resume instead."""
    if (problem := resume_problem(folder)) is None:
        return
    run = folder.parent.parent
    others = (
        [other for other in _folders(run) if resume_problem(other) is None]
        if folder.parent.name == "ckpts"
        else []
    )
    resumable = [f"To resume its run from {others[0]}, set --resume_ckpt {others[0]}."] if others else []
    weights = [] if model_problem(folder) else [_start_from(folder)]
    raise UserError([f"resume_ckpt: {problem}.", *resumable, *weights])


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoint folders: latest branch first, then highest step, at last unknown steps.

    Of the same step, one that was due comes before one that was written because the run ended untimely or the
    loss was low, and that has pending work.
    """
    return [folder for folder in _folders(run) if (folder / MANIFEST).is_file()]


def single_files(folder: Path, run: str, *, best: bool = False, ema: bool = False) -> list[Path]:
    """Return the single files in `folder` that a run wrote, as their headers say, newest first.

    `best` selects those of `keep_best`, and `ema` those of EMA weights, instead of all others.
    """
    found = []
    for path in folder.glob("*.safetensors"):
        try:
            metadata = read_metadata(path)
        except (OSError, UserError):
            continue  # another program's file
        is_kind = (metadata.get(KIND) == BEST) == best and (metadata.get(EMA) == "true") == ema
        place = metadata.get(BRANCH, "0"), metadata.get(STEP, "")
        if metadata.get(RUN) == run and is_kind and all(_NUMBER.fullmatch(part) for part in place):
            found.append((*(-int(part) for part in place), path.name, path))
    return [path for *_, path in sorted(found)]


def rotate(run: Path, options: SaveOptions, single_folder: Path) -> None:
    """Delete older checkpoints and their resume state as the options say, once a newer one is whole.

    Resume state goes beyond `keep_resume_n`, with it the folders that are kept for resuming only; models go
    beyond `keep_last_n`. What `keep_best` made is counted by itself: its newest stays.

    What cannot be deleted, for instance because another program has it open, stays whole.
    """
    hidden, resumable = run / "ckpts", 0
    places = {False: -1, True: -1}
    for folder in checkpoints(run):
        best = place_in_run(folder)["kind"] == BEST
        places[best] += 1
        kept = 1 if best else options.keep_last_n
        resumable += (folder / RESUME).is_dir()
        if kept is not None and places[best] >= kept:
            drop(folder)
        elif (folder / RESUME).is_dir() and resumable > options.keep_resume_n and not options.save_optimizer:
            drop(folder if options.save_format == "single" else folder / RESUME, hidden)
    for ema in (False, True):
        if options.keep_last_n is not None:
            for path in single_files(single_folder, run.name, ema=ema)[options.keep_last_n :]:
                drop(path)
        for path in single_files(single_folder, run.name, best=True, ema=ema)[1:]:
            drop(path)


def _newest(
    runs: Sequence[Path], none: str, *, weights_only: bool, project: str | None = None
) -> tuple[Path, list[str]]:
    """Return the newest whole checkpoint of runs given newest first, and problems of newer ones.

    `none` is the sentence for no checkpoint at all; without a `project`, those of any count.
    """
    # "demo-two" starts like "demo".
    found = [
        folder
        for run in runs
        for folder in _folders(run)
        if project is None or place_in_run(folder)["project"] in (project, None)
    ]
    damaged: list[str] = []
    for folder in found:
        if (problem := model_problem(folder) if weights_only else resume_problem(folder)) is None:
            return folder, damaged
        damaged.append(problem)
    whole = next((folder for folder in found if not weights_only and model_problem(folder) is None), None)
    raise UserError(
        [
            f"resume_ckpt: {none}",
            *(f"{problem}." for problem in damaged),
            *([_start_from(whole)] if whole else []),
        ]
    )


def _start_from(folder: Path) -> str:
    return (
        f"To start a new run at step 0 from the weights of {folder}, "
        f"set --resume_ckpt {folder} --resume_weights_only."
    )


def _folders(run: Path) -> list[Path]:
    """Return `checkpoints`, and among them folders named like one whose manifest is lost."""
    if is_free(run):  # a process that is replacing one now will do it itself
        restore(run / "ckpts")
    found = [
        path for path in (run / "ckpts").glob("*/") if not path.name.startswith(".") and is_checkpoint(path)
    ]
    untimely = ("interrupted-", "errored-", f"{BEST}-")
    return sorted(
        found,
        key=lambda folder: (
            *(-part for part in _place(folder)),
            folder.name.startswith(untimely),
            folder.name,
        ),
    )


def _place(folder: Path) -> tuple[int, int]:
    """Return branch and step of a checkpoint."""
    place = place_in_run(folder)
    return place["branch"], place["step"]
