"""Checkpoints: whole or absent, and everything needed to resume as if nothing had happened.

A checkpoint is a folder, `{project}-ep03-gs00024`:

- a diffusers model folder with the trained weights in training precision, and `manifest.json` with size and
SHA-256 of each of its files;
- `resume/`: counters (`state.json`), optimizer state, and a manifest of its own, so that it can be dropped
from older checkpoints.

It is written under a hidden name beside its place, flushed to the disk and renamed. A single .safetensors
file in the original layout is written the same way next to it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.atomic import appearing
from data.regular import LARGEST_STATE, load_json, open_regular
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
"""Header field of a single file: the kind of checkpoint."""

BRANCH = "sd_dadapt.branch"
"""Header field of a single file: the branch of its run, missing on the first."""

EMA = "sd_dadapt.ema"
"""Header field of a single file: "true" for EMA weights."""

BEST = "best"
"""The kind of checkpoint that the next of its kind replaces."""

_STEP = re.compile(r"-gs(\d+)$")
"""The end of a checkpoint folder's name."""


@dataclass
class TrainState:
    """The position of a run, in counters."""

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
    """Steps until then without finite gradients, which changed nothing."""
    last_finite: int = 0
    """The last report with at least one finite step."""
    seconds: float = 0.0
    """Time spent training."""
    last_fixed_loss: int = 0
    """The step of the last fixed-noise loss."""
    pending: list[str] = field(default_factory=list)
    """Work due after this step that a signal interrupted; `owed` in the file."""

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
    branch: int = 0,
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        folder: its parent is made if missing.
        write_resume: writes the resume state; None for a model alone.
        about: values that a resumed run must share: seed, data, optimizers, ...
        kind: the reason for the checkpoint.
        branch: how often the run has gone back to an older checkpoint; later branches are newer.
    """
    with appearing(folder) as draft:
        draft.mkdir(parents=True)
        write_model(draft)
        where = {"step": state.step, "epoch": state.epoch, "project": about.get("project"), "kind": kind}
        where |= {"branch": branch} if branch else {}
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
    """Return the counters and the `about` of a whole checkpoint."""
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: the state of the run cannot be read ({said(error)}); choose another checkpoint."
        ) from error


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, by its manifest, its resume state or else its name."""
    return (
        (folder / MANIFEST).is_file()
        or (folder / RESUME).is_dir()
        or (folder.is_dir() and _STEP.search(folder.name) is not None)
    )


def model_problem(folder: Path) -> str | None:
    """Return why the model of a checkpoint is not whole, as a clause; None if it is."""
    return _problem(folder)


def resume_problem(folder: Path) -> str | None:
    """Return why no run can be resumed from `folder`, as a clause; None if one can."""
    if not (folder / RESUME).is_dir():
        return f"{folder}: the checkpoint holds no resume state (only the newest keep it, see keep_resume_n)"
    return _problem(folder) or _problem(folder / RESUME)


def place_in_run(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's place in its run; without a manifest, the step in its name or else -1."""
    try:
        manifest = load_json(folder / MANIFEST, LARGEST_STATE)
        return {
            "step": int(manifest["step"]),
            "project": manifest["project"],
            "kind": manifest.get("kind", ""),
            "branch": int(manifest.get("branch", 0)),
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # 1e999 is read as infinity
        named = _STEP.search(folder.name)
        return {"step": int(named[1]) if named else -1, "project": None, "kind": "", "branch": 0}


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
