"""Checkpoints: whole or absent, and everything needed to go on as if nothing had happened.

A checkpoint is a folder, `{project}-ep03-gs00024`:

- a diffusers model folder with the trained weights in fp32, and `manifest.json` with size and SHA-256 of each of its files;
- `resume/`: counters (`state.json`), optimizer state, and a manifest of its own, so that it can be dropped from older checkpoints.

It is written under a hidden name beside its place, flushed to the disk and renamed. A single .safetensors file in the original
layout is written the same way next to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from trainer.errors import UserError

MANIFEST = "manifest.json"
RESUME = "resume"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """When checkpoints are written, where, and in which form."""

    save_every_n_epochs: Annotated[int, Ge(1)] | None = None
    """Save a checkpoint after every n-th epoch; null saves at the end only."""

    save_ckpts_from_n_epochs: Annotated[int, Ge(0)] = 0
    """Save no checkpoint before this epoch."""

    save_ckpt_dir: str | None = None
    """A folder for the single-file .safetensors instead of the run's own ckpts folder."""

    save_format: Literal["both", "diffusers", "single"] = "both"
    """What a checkpoint consists of: a diffusers folder in training precision, a single .safetensors in the original layout, or both;
    with single, a folder is kept for resuming only, beside the newest file."""

    no_save_ckpt: bool = False
    """Do not write the single file; the same as save_format: diffusers."""

    save_full_precision: bool = False
    """Write the single file in fp32 instead of fp16."""

    save_optimizer: bool = False
    """Keep the optimizer state of every checkpoint, not only of the newest."""

    keep_resume_n: Annotated[int, Ge(1)] = 1
    """How many of the newest checkpoints keep the state that resuming needs."""


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

    last_finite: int = 0
    """The last reported step with a finite loss."""

    seconds: float = 0.0
    """Time spent training."""

    last_fixed_loss: int = 0
    """The step of the last fixed-noise loss."""

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
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        folder: where it appears; its parent is made if absent.
        write_model: writes the model's files into the folder that it is given.
        write_resume: writes what resuming needs, or None for a model alone.
        state: the counters.
        about: what a resumed run has to agree with: seed, data, optimizers, ...
    """
    with _appearing(folder) as draft:
        draft.mkdir(parents=True)
        write_model(draft)
        _write_manifest(draft, {"step": state.step, "epoch": state.epoch})
        if write_resume is not None:
            resume = draft / RESUME
            resume.mkdir()
            write_resume(resume)
            _write_json(resume / "state.json", {"state": asdict(state), "about": about})
            _write_manifest(resume, {"step": state.step, "epoch": state.epoch})


def save_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write one file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _appearing(path) as draft:
        write(draft)


def read_resume(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Return the counters and the `about` of a checkpoint.

    Raises:
        UserError: the folder holds no resume state, or it is damaged.
    """
    problem = resume_problem(folder)
    if problem:
        raise UserError(problem)
    saved = json.loads((folder / RESUME / "state.json").read_text(encoding="utf-8"))
    return TrainState(**saved["state"]), saved["about"]


def resume_problem(folder: Path) -> str | None:
    """Return why a run cannot go on from `folder`, in one sentence, or None where it can: every file is there and unchanged."""
    if not (folder / RESUME / MANIFEST).is_file():
        return f"{folder}: the checkpoint holds no resume state (only the newest keep it, see keep_resume_n)."
    for part in (folder, folder / RESUME):
        try:
            manifest = json.loads((part / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                return (
                    f"{part}: the checkpoint has format {manifest['format']}, this version reads {FORMAT}; use the version that wrote it."
                )
            for name, entry in manifest["files"].items():
                path = part / name
                if not path.is_file():
                    return f"{path}: the file is missing from the checkpoint; choose another checkpoint."
                if path.stat().st_size != entry["size"] or _sha256(path) != entry["sha256"]:
                    return f"{path}: the file is not what the checkpoint's manifest says; choose another checkpoint."
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{part / MANIFEST}: the manifest cannot be read ({error}); choose another checkpoint."
    return None


def find_last(logdir: Path, project: str) -> Path:
    """Return the newest whole checkpoint of a project: in its newest run that has one, the one of the highest step.

    Runs are ordered by the timestamp in their folders' names, never by the file system's times.

    Raises:
        UserError: there is none.
    """
    runs = sorted((path for path in logdir.glob(f"{_escape(project)}-*") if path.is_dir()), key=_timestamp, reverse=True)
    damaged = []
    for run in runs:
        for folder in checkpoints(run):
            problem = resume_problem(folder)
            if problem is None:
                if read_resume(folder)[1].get("project", project) == project:  # "demo" is not "demo-two"
                    return folder
                break
            if (folder / RESUME).exists():
                damaged.append(problem)
    raise UserError(
        [
            f"resume_ckpt: findlast found no checkpoint of project {project!r} to go on from in {logdir} ({len(runs)} runs looked at); "
            "name a checkpoint folder or a model instead.",
            *damaged,
        ]
    )


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoint folders, the highest step first."""
    steps = []
    for path in (run / "ckpts").glob("*/" + MANIFEST):
        try:
            steps.append((int(json.loads(path.read_text(encoding="utf-8"))["step"]), path.parent))
        except (OSError, ValueError, KeyError, TypeError):
            steps.append((-1, path.parent))
    return [folder for _, folder in sorted(steps, key=lambda item: (-item[0], item[1].name)) if not folder.name.startswith(".")]


def rotate(run: Path, options: SaveOptions) -> None:
    """Drop what older checkpoints no longer need: resume state beyond `keep_resume_n`, and folders kept for resuming only."""
    kept = 0
    for folder in checkpoints(run):
        if not (folder / RESUME).is_dir():
            continue
        kept += 1
        if kept <= options.keep_resume_n or options.save_optimizer:
            continue
        doomed = folder if options.save_format == "single" else folder / RESUME
        hidden = folder.parent / f".dropped-{folder.name}"
        doomed.rename(hidden)
        shutil.rmtree(hidden)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`, which takes its place when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".draft-{path.name}"
    _remove(draft)
    try:
        yield draft
        _flush(draft)
        if path.is_dir():  # the same step saved again: a folder cannot be renamed onto another
            old = path.parent / f".dropped-{path.name}"
            _remove(old)
            path.rename(old)
            draft.rename(path)
            _remove(old)
        else:
            draft.replace(path)
        _flush_folder(path.parent)
    except BaseException:
        _remove(draft)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        for folder in [path, *(found for found in path.rglob("*") if found.is_dir())]:
            _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to flush; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _timestamp(run: Path) -> tuple[str, str]:
    return run.name[-15:], run.name


def _escape(name: str) -> str:
    import glob

    return glob.escape(name)
