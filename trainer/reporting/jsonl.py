"""A run's numbers as lines of JSON, for programs that read no TensorBoard files."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image

from data.atomic import appearing
from data.regular import open_regular
from trainer.errors import UserError

METRICS = "metrics.jsonl"


class JsonlLogger:
    """Append the numbers of each report to metrics.jsonl: {"step": 25, "loss/log_step": 0.12, ...}.

    Non-finite numbers are null. A call returns after its line is in the file. If writing fails, the numbers
    are lost, `warn` is called once and training continues; every later call tries again.

    Args:
        folder: made if missing.
        purge_step: drop the lines from this step on, and incomplete ones.
        last_report: the last step before it with a report; `warn` is called with a gap before it.

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
                self._purge(purge_step, last_report)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{self._path}: the run's numbers cannot be written ({reason}); choose another logdir."
            ) from error

    def _purge(self, purge_step: int, last_report: int) -> None:
        with open_regular(self._path) as file:
            lines = [(_step(line), line) for line in file]
        kept = [(step, line) for step, line in lines if step < purge_step]
        with appearing(self._path) as draft:
            draft.write_bytes(b"".join(line for _, line in kept))
        gaps = []
        # The last line does not count: a killed process cuts it off.
        if damaged := sum(step == math.inf for step, _ in lines[:-1]):
            gaps.append(f"{damaged} damaged line{'s are' if damaged > 1 else ' is'} dropped")
        if (last := max((int(step) for step, _ in kept), default=0)) < last_report:
            gaps.append(f"the numbers of steps {last + 1} to {last_report} are missing")
        if gaps:
            self._warn(
                f"{self._path}: {' and '.join(gaps)}; TensorBoard's event files are kept apart and may have "
                "them"
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by tag."""
        if self._closed:
            return
        finite = {tag: float(value) if math.isfinite(value) else None for tag, value in values.items()}
        line = json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                append(file, line)
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or str(error)
                self._warn(
                    f"{self._path}: numbers are not recorded ({reason}); training continues, recording too "
                    "as soon as it can"
                )

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Do nothing: the run's folder holds the image."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Do nothing: the run's folder holds the configuration."""

    def close(self) -> None:
        """Stop recording."""
        self._closed = True


def append(file: io.FileIO, content: bytes) -> None:
    """Append all bytes or, if that fails, none: half a record would hide the next."""
    start = file.seek(0, os.SEEK_END)
    left = memoryview(content)
    try:
        while left:
            left = left[file.write(left) or 0 :]
    except OSError:
        with suppress(OSError):  # the first error matters
            file.truncate(start)
        raise


def _step(line: bytes) -> float:
    """Return the step of a line, infinity for an incomplete one."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
