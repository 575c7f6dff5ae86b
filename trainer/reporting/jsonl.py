"""A run's numbers as lines of JSON, for programs that read no TensorBoard files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data.regular import open_regular
from trainer.checkpoints.atomic import appearing
from trainer.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

METRICS = "metrics.jsonl"


class JsonlLogger:
    """Append a line to metrics.jsonl for every report: {"step": 25, "loss/log_step": 0.12, ...}; pictures and texts are left out.

    Numbers that are not finite are null, which JSON has instead. A line is whole and in the file when a call
    returns. When writing fails, `warn` is told once, the numbers are lost and training goes on; every later
    call tries again.

    Args:
        folder: where the file goes; made if missing.
        warn: is told of trouble in one sentence.
        purge_step: drop the lines of this step and later ones, and those that are not whole.
        last_report: the last step before it whose numbers should be there; `warn` is told of a gap.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        warn: Callable[[str], None],
        purge_step: int | None = None,
        last_report: int = 0,
    ) -> None:
        self._path = folder / METRICS
        self._warn = warn
        self._warned = self._closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            if purge_step is not None:
                with open_regular(self._path) as file:
                    lines = [(_step(line), line) for line in file]
                kept = [(step, line) for step, line in lines if step < purge_step]
                with appearing(self._path) as draft:
                    draft.write_bytes(b"".join(line for _, line in kept))
                damaged = sum(
                    step == math.inf for step, _ in lines[:-1]
                )  # a killed process cuts the last line off
                last = max((int(step) for step, _ in kept), default=0)
                gaps = (
                    [f"{damaged} damaged line{'s are' if damaged > 1 else ' is'} dropped"] if damaged else []
                )
                gaps += (
                    [f"the numbers of steps {last + 1} to {last_report} are missing"]
                    if last < last_report
                    else []
                )
                if gaps:
                    warn(
                        f"{self._path}: {' and '.join(gaps)}; TensorBoard's event files are kept apart and may have them"
                    )
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{self._path}: the run's numbers cannot be written ({reason}); choose another logdir."
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        if self._closed:
            return
        finite = {tag: float(value) if math.isfinite(value) else None for tag, value in values.items()}
        line = json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or str(error)
                self._warn(
                    f"{self._path}: numbers are not recorded ({reason}); training goes on, recording too as soon as it can"
                )

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Leave a picture to the other recorders; its file is in the run's folder."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Leave a text to the other recorders; the configuration is in the run's folder."""

    def close(self) -> None:
        """Record nothing any more."""
        self._closed = True

    def _append(self, line: bytes) -> None:
        """Write a whole line or, where that fails, nothing: half a line would spoil the next."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            start = file.tell()
            left = memoryview(line)
            try:
                while left:
                    left = left[file.write(left) or 0 :]
            except OSError:
                with suppress(OSError):  # the first error says why
                    file.truncate(start)
                raise


def _step(line: bytes) -> float:
    """Return the step of a line, infinity for one that is not whole."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
