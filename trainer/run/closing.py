"""The closing lines of a run: its results, how to use and resume it, and the learned rate."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from data.atomic import WINDOWS
from trainer.checkpoints.format import RESUME
from trainer.checkpoints.listing import checkpoints, single_files
from trainer.checkpoints.options import SaveOptions
from trainer.config.schema import TrainConfig
from trainer.environment import PROGRAM
from trainer.models.ema import SUFFIX
from trainer.output import WIDTH, duration, shown_path
from trainer.planning.resume import joined, resume_words
from trainer.run.announce import NAMED_FILES
from trainer.training.run import Run

_NARROW = 76
"""Columns of a line of a long command."""

HANG = 13
"""Columns of a line's label."""


def results(run: Run, config: TrainConfig, *, failed: bool = False) -> list[str]:
    """Return what a run has made, whether it is at its end or stopped, with labels of `HANG` columns."""
    state, total = run.state, run.cadence.total_steps
    if state.step == 0:
        return ["Stopped before the first step: nothing is kept of this run."]
    by = " by max_train_time" if run.out_of_time else ""
    ended = (
        "Done" if state.step >= total and not failed else f"Stopped after step {state.step} of {total}{by}"
    )
    lines = [
        f"{ended}: {state.step} steps, {state.images} images in {duration(state.seconds)} of training.",
        *_skipped([file.name for file in run.loader.left_out]),
        f"Run folder:  {shown_path(run.folder)}, which holds:",
        *_samples(run.folder / "samples"),
    ]
    whole = checkpoints(run.folder)
    lines += _use(run.folder, whole, config.saving, adapters=config.parts.trains_adapters)
    lines.append(f"Curves:      tensorboard --logdir {shlex.quote(shown_path(run.folder.parent))}")
    return lines


def how_to_resume(
    run: Run, config: TrainConfig, arguments: Sequence[str], *, failed: bool = False
) -> list[str]:
    """Return the command that resumes a run, on lines that a shell takes as one.

    There is none without a checkpoint, or if all steps are made and the run has failed.
    """
    if not any((folder / RESUME).is_dir() for folder in checkpoints(run.folder)):
        return []
    changed: dict[str, str] = {}
    if config.loop.stop_after_steps is not None:
        changed["stop_after_steps"] = "null"
    if run.out_of_time:
        changed["max_train_time"] = "null"
    reason = "Resume with:"
    if run.state.step >= run.cadence.total_steps and not run.state.pending and run.saver.up_to_date:
        if failed:
            return []
        changed["max_epochs"] = str(2 * max(run.epochs, run.state.epoch))
        reason = f"To train on, raise max_epochs (it is {run.epochs}):"
    words = resume_words(
        arguments,
        run.folder,
        changed=changed,
        launcher=run.processes.launcher,
        program=shown_path(PROGRAM),
    )
    line = f"{reason}  {joined(words)}"
    return [line] if len(line) <= WIDTH else [reason, *_lines_of(words)]


def _skipped(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    files = "1 unreadable file" if len(names) == 1 else f"{len(names)} unreadable files"
    more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
    return [f"Skipped {files}: {', '.join(names[:NAMED_FILES])}{more}."]


def _samples(folder: Path) -> list[str]:
    found = sorted(folder.glob("gs*.png"))
    if not found:
        return []
    own = [path for path in found if not path.stem.endswith(SUFFIX)] or found  # else of EMA weights alone
    first, last = own[0].name, own[-1].name
    before = f"; before training: samples/{first}" if first.startswith("gs00000") and first != last else ""
    return [f"  samples:   samples/{last}{before}"]


def _use(run: Path, whole: Sequence[Path], saving: SaveOptions, *, adapters: bool) -> list[str]:
    """Return the line about the use of the newest model."""
    if not whole:
        return ["  no checkpoint: none was saved"]
    folder = whole[0].relative_to(run).as_posix()
    singles = (
        single_files(Path(saving.save_ckpt_dir or run / "ckpts"), run.name) if saving.writes_single else []
    )
    if not singles:
        if adapters:
            return [f"  to use it: load {folder} by load_lora_weights of diffusers"]
        return [f"  to use it: load {folder} with diffusers, or convert it by scripts/convert_checkpoint.py"]
    place = shown_path(singles[0]) if saving.save_ckpt_dir else singles[0].relative_to(run).as_posix()
    models = "models/Lora" if adapters else "models/Stable-diffusion"
    also = f"; the folder {folder} is for diffusers" if saving.save_format == "both" else ""
    return [f"  to use it: copy {place} to {models} of your web UI{also}"]


def _lines_of(words: Sequence[str]) -> list[str]:
    """Return a command on lines that a shell takes as one, broken before options; one line on Windows."""
    if WINDOWS:
        return [joined(words)]
    starts = [number for number, word in enumerate(words) if word.startswith("--")]
    parts = [joined(words[first:last]) for first, last in pairwise([0, *starts, len(words)])]
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > _NARROW:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] += f" {part}"
    return lines
