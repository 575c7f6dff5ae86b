"""Checkpoints: whole or absent, and everything needed to go on as if nothing had happened.

A checkpoint is a folder, `{project}-ep03-gs00024`:

- a diffusers model folder with the trained weights in training precision, and `manifest.json` with size and
SHA-256 of each of its files;
- `resume/`: counters (`state.json`), optimizer state, and a manifest of its own, so that it can be dropped
from older checkpoints.

It is written under a hidden name beside its place, flushed to the disk and renamed. A single .safetensors
file in the original layout is written the same way next to it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.regular import LARGEST_STATE, load_json, open_regular
from trainer.checkpoints.atomic import appearing, drop, restore
from trainer.checkpoints.lock import is_free
from trainer.checkpoints.options import SaveOptions
from trainer.contained import files_inside, inside
from trainer.errors import UserError, said
from trainer.state_file import as_kind

MANIFEST = "manifest.json"
RESUME = "resume"
FORMAT = 2

RUN = "sd_dadapt.run"
"""Header field of a single file: the name of the folder of the run that wrote it."""

STEP = "sd_dadapt.step"
"""Header field of a single file: the optimizer step."""

KIND = "sd_dadapt.kind"
"""Header field of a single file: why it was written."""

EMA = "sd_dadapt.ema"
"""Header field of a single file: "true" where its weights are averages."""

BEST = "best"
"""The kind of checkpoint that the next of its kind replaces."""

_STEP = re.compile(r"-gs(\d+)$")
"""The end of a checkpoint folder's name."""


@dataclass
class TrainState:
    """Where a run is."""

    step: int = 0
    """Optimizer steps made."""

    epoch: int = 0
    """Epochs completed; the plan of the next step is this epoch's."""

    step_in_epoch: int = 0
    """Steps made of the current epoch."""

    images: int = 0
    """Images trained, repeats counted."""

    last_report: int = 0
    """The step of the last report."""

    skipped: int = 0
    """Steps until then that changed nothing, since their gradients were not finite."""

    last_finite: int = 0
    """The last reported step before which, since the report before it, some step changed something."""

    seconds: float = 0.0
    """Time spent training."""

    last_fixed_loss: int = 0
    """The step of the last fixed-noise loss."""

    pending: list[str] = field(default_factory=list)
    """Work due after this step that a signal kept from being done; `owed` in the file."""

    def advance(self, images: int, steps_in_epoch: int, seconds: float) -> None:
        """Count one optimizer step of an epoch that has `steps_in_epoch`."""
        self.step += 1
        self.step_in_epoch += 1
        self.images += images
        self.seconds += seconds
        if self.step_in_epoch >= steps_in_epoch:
            self.epoch, self.step_in_epoch = self.epoch + 1, 0


def save_checkpoint(
    folder: Path,
    *,
    write_model: Callable[[Path], None],
    write_resume: Callable[[Path], None] | None,
    state: TrainState,
    about: dict[str, Any],
    kind: str = "",
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        folder: where it appears; its parent is made if absent.
        write_model: writes the model's files into the folder that it is given.
        write_resume: writes what resuming needs, or None for a model alone.
        state: the counters.
        about: what a resumed run has to agree with: seed, data, optimizers, ...
        kind: why it is written.
    """
    with appearing(folder) as draft:
        draft.mkdir(parents=True)
        write_model(draft)
        where = {"step": state.step, "epoch": state.epoch, "project": about.get("project"), "kind": kind}
        _write_manifest(draft, where)
        if write_resume is not None:
            resume = draft / RESUME
            resume.mkdir()
            write_resume(resume)
            _write_json(resume / "state.json", {"state": _as_saved(state), "about": about})
            _write_manifest(resume, where)


_SAVED_AS = {"owed": "pending"}
"""Names of counters in checkpoints that differ from the fields'."""


def _as_saved(state: TrainState) -> dict[str, Any]:
    names = {field: name for name, field in _SAVED_AS.items()}
    return {names.get(name, name): value for name, value in asdict(state).items()}


def read_resume(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Return the counters and the `about` of a checkpoint that has been found whole.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / RESUME / "state.json"
    try:
        saved = load_json(path, LARGEST_STATE)
        counters = {_SAVED_AS.get(name, name): value for name, value in saved["state"].items()}
        state, about = as_kind(TrainState, counters), saved["about"]
        as_kind(
            tuple[dict, dict, int, int],
            (about["same"], about["config"], about["total_steps"], about["same"]["seed"]),
        )
        if min(state.step, state.epoch, state.step_in_epoch, state.images) < 0:
            raise ValueError("a count is negative")
        return state, about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: the state of the run cannot be read ({said(error)}); choose another checkpoint."
        ) from error


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of this program, by its manifest, its resume state or else its name."""
    return (
        (folder / MANIFEST).is_file()
        or (folder / RESUME).is_dir()
        or (folder.is_dir() and _STEP.search(folder.name) is not None)
    )


def model_problem(folder: Path) -> str | None:
    """Return why the model of a checkpoint is not whole, as a clause, or None where every file is there and unchanged."""
    return _problem(folder)


def resume_problem(folder: Path) -> str | None:
    """Return why no run can be resumed from `folder`, as a clause, or None if every file is there and unchanged."""
    if not (folder / RESUME).is_dir():
        return f"{folder}: the checkpoint holds no resume state (only the newest keep it, see keep_resume_n)"
    return _problem(folder) or _problem(folder / RESUME)


def find_last(logdir: Path, project: str, *, weights_only: bool = False) -> tuple[Path, list[str]]:
    """Return the newest whole checkpoint of a project, and what is wrong with newer ones.

    It is the one of the highest step in the newest run that has one. Runs are ordered by the timestamp in
    their folders' names, never by the file system's times.

    Args:
        logdir: the folder of the run folders.
        project: the project's name.
        weights_only: a whole model will do, without the state that resuming needs.

    Raises:
        UserError: there is none.
    """
    runs = sorted(
        (path for path in logdir.glob(f"{glob.escape(project)}-*") if path.is_dir()),
        key=by_timestamp,
        reverse=True,
    )
    none = f"findlast found no checkpoint of project {project!r} to resume in {logdir} ({len(runs)} runs looked at)"
    return _newest(
        runs, f"{none}; name a model to start a new run.", weights_only=weights_only, project=project
    )


def newest_of(run: Path, *, weights_only: bool = False) -> tuple[Path, list[str]]:
    """Return a run's whole checkpoint of the highest step, and what is wrong with those of higher steps.

    Raises:
        UserError: there is none.
    """
    return _newest([run], f"the run {run} holds no checkpoint to resume.", weights_only=weights_only)


def require_resumable(folder: Path) -> None:
    """Refuse a checkpoint that no run can be resumed from.

    Raises:
        UserError: it has no resume state, or is damaged; the message says what to name instead.
    """
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
    """Return a run's checkpoint folders, the highest step first, and last those whose step is unknown.

    Of the same step, one that was due comes before one that was written because the run ended untimely or the
    loss was low: it owes nothing.
    """
    return [folder for folder in _folders(run) if (folder / MANIFEST).is_file()]


def single_files(folder: Path, run: str, *, best: bool = False, ema: bool = False) -> list[Path]:
    """Return the single files in `folder` that a run wrote, as their headers say, the highest step first.

    Args:
        folder: which other runs may write to, too.
        run: the name of the run's folder.
        best: those that `keep_best` made instead of all others.
        ema: those of averaged weights instead of all others.
    """
    from trainer.models.tensor_file import read_metadata

    found = []
    for path in folder.glob("*.safetensors"):
        try:
            metadata = read_metadata(path)
        except (OSError, UserError):
            continue  # another program's file
        is_kind = (metadata.get(KIND) == BEST) == best and (metadata.get(EMA) == "true") == ema
        if metadata.get(RUN) == run and re.fullmatch(r"[0-9]{1,18}", metadata.get(STEP, "")) and is_kind:
            found.append((int(metadata[STEP]), path))
    return [path for _, path in sorted(found, key=lambda item: (-item[0], item[1].name))]


def rotate(run: Path, options: SaveOptions, single_folder: Path) -> None:
    """Drop what older checkpoints no longer need, and older checkpoints: to be called when a newer one is whole.

    Resume state goes beyond `keep_resume_n`, with it the folders that are kept for resuming only; models go
    beyond `keep_last_n`. What `keep_best` made is counted by itself: its newest stays.

    Raises:
        OSError: something cannot be deleted, for instance because another program has it open; what is left
        is whole.
    """
    hidden, resumable = run / "ckpts", 0
    places = {False: -1, True: -1}
    for folder in checkpoints(run):
        best = _manifest(folder)["kind"] == BEST
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
    """Return the newest whole checkpoint of several runs, the newest run first, and what is wrong with newer ones.

    Args:
        runs: the runs' folders.
        none: the sentence for no checkpoint at all.
        weights_only: a whole model will do.
        project: of the checkpoints; None takes those of any.

    Raises:
        UserError: there is none.
    """
    # "demo-two" begins like "demo".
    found = [
        folder
        for run in runs
        for folder in _folders(run)
        if project is None or _manifest(folder)["project"] in (project, None)
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
    return f"To start a new run at step 0 from the weights of {folder}, set --resume_ckpt {folder} --resume_weights_only."


def _folders(run: Path) -> list[Path]:
    """Return `checkpoints`, and among them folders named like one whose manifest is lost."""
    if is_free(run):  # a process that is replacing one now will do it itself
        restore(run / "ckpts")
    found = [
        path for path in (run / "ckpts").glob("*/") if not path.name.startswith(".") and is_checkpoint(path)
    ]
    untimely = ("interrupted-", "errored-", f"{BEST}-")
    return sorted(
        found, key=lambda folder: (-_manifest(folder)["step"], folder.name.startswith(untimely), folder.name)
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's place in its run; of a damaged manifest the step in the folder's name, -1 if it has none."""
    try:
        manifest = load_json(folder / MANIFEST, LARGEST_STATE)
        return {
            "step": int(manifest["step"]),
            "project": manifest["project"],
            "kind": manifest.get("kind", ""),
        }
    except (OSError, ValueError, KeyError, TypeError):
        named = _STEP.search(folder.name)
        return {"step": int(named[1]) if named else -1, "project": None, "kind": ""}


def _problem(part: Path) -> str | None:
    try:
        files_inside(part)  # state is read by its name, whether the manifest lists it or not
        manifest = load_json(part / MANIFEST, LARGEST_STATE)
        if manifest["format"] != FORMAT:
            return f"{part}: the checkpoint has format {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            path = inside(part, name)
            if not path.is_file():
                return f"{path}: the file is missing from the checkpoint"
            try:
                changed = path.stat().st_size != entry["size"] or _sha256(path) != entry["sha256"]
            except OSError as error:
                return f"{path}: the file cannot be read ({error.strerror})"
            if changed:
                return f"{path}: the file is not what the checkpoint's manifest says"
    except UserError as error:
        return str(error).rstrip(".")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{part / MANIFEST}: the manifest cannot be read ({error})"
    return None


def _write_manifest(folder: Path, about: dict[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    _write_json(folder / MANIFEST, {"format": FORMAT, **about, "files": files})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    status = path.stat()
    if status.st_nlink < 2:
        return _digest(path)
    # A part of the base that every checkpoint has a name for; its gigabyte is read once.
    known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if known not in _LINKED:
        _LINKED[known] = _digest(path)
    return _LINKED[known]


_LINKED: dict[tuple[int, ...], str] = {}


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_timestamp(run: Path) -> tuple[str, str]:
    """Return what orders run folders from the oldest to the newest: the timestamp in their names."""
    return run.name[-15:], run.name
