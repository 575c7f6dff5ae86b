"""What reading a data set can end in: a `DataError` stops the run, a `FileError` costs one file."""

from __future__ import annotations

from collections.abc import Sequence


class DataError(Exception):
    """Stop with plain sentences: the data as a whole cannot be trained on.

    Args:
        problems: one sentence or several; each says where, what was found, what is accepted and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class FileError(Exception):
    """Leave one file out: `reason` says what is wrong with it, as the end of a sentence that begins with its name."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
