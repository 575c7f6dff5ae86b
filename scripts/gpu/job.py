"""What a step of the report is given, and how it hands over results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Result = dict[str, Any]
"""One measurement, as JSON can hold it."""


@dataclass(frozen=True)
class Job:
    """A step to take."""

    name: str
    device: str
    """cuda or cpu."""
    tiny: bool
    """Whether the bundled model stands for the full-size one, and everything is made short: to test the report, not to measure."""
    folder: Path
    """For files of the step's own."""
    argument: str = ""
    """What distinguishes steps of one kind: an optimizer."""


class Step(Protocol):
    """Measures something."""

    def __call__(self, job: Job, tell: Callable[[Result], None]) -> None:
        """Measure, and hand over every result as soon as there is one."""
        ...
