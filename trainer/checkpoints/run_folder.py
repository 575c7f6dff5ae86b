"""The folder of a run: which folders this program made, and so may write to when a run is resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from data.regular import load_json
from trainer.contained import inside
from trainer.errors import UserError

MARKER = "run.json"
"""The file that marks a run's folder."""

_MARK = {"program": "sd-dadapt", "format": 1}
_TIMED = re.compile(r"-\d{8}-\d{6}$")
"""The end of a run folder's name."""


def mark(run: Path) -> None:
    """Write the marker into a run's folder."""
    try:
        (run / MARKER).write_text(json.dumps(_MARK) + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{run / MARKER}: the file cannot be written ({reason}); check disk and permissions."
        ) from error


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in; None if it was copied out of its run.

    Links that lead out of the run's folder, where resuming would write, are refused.
    """
    place = checkpoint.resolve()
    run = place.parent.parent
    if place.parent.name != "ckpts" or not _is_run(run):
        return None
    for pattern in ("*", "*/*"):
        for path in run.glob(pattern):
            inside(run, path.relative_to(run))
    return run


def _is_run(folder: Path) -> bool:
    """Return whether this program made a folder, by its marker or, in older runs, its name and files."""
    try:
        return load_json(folder / MARKER) == _MARK
    except (OSError, ValueError):
        written = ("train.json", "optimizer.json", "run.log")
        return _TIMED.search(folder.name) is not None and all((folder / name).is_file() for name in written)


def by_timestamp(run: Path) -> tuple[str, str]:
    """Return what orders run folders from the oldest to the newest: the timestamp in their names."""
    return run.name[-15:], run.name
