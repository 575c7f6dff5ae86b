"""The job of a step of the report, and the form of its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Result = dict[str, Any]
"""One measurement, in JSON's types."""


@dataclass(frozen=True)
class Job:
    """A step to run."""

    name: str
    device: str
    """cuda or cpu."""
    tiny: bool
    """Use the bundled model and few steps: tests the report, measures nothing."""
    folder: Path
    """The step's own folder."""
    argument: str = ""
    """The optimizer, in steps of one kind."""


class Step(Protocol):
    """A step of the report."""

    def __call__(self, job: Job, tell: Callable[[Result], None]) -> None:
        """Measure, and pass every result to `tell` at once."""
        ...
