"""Errors that are shown as sentences: a `UserError` stops the run, a `FileError` skips one file."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Stop with plain sentences: something in the configuration, the data or the environment must change.

    Args:
        problems: one sentence or several; each names the place, the finding, the accepted values and the fix.
        exit_code: the process's exit status, 2 unless the run had already started.
    """

    def __init__(self, problems: str | Sequence[str], *, exit_code: int = 2) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.exit_code = exit_code
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Stop because the data as a whole cannot be trained on."""


class FileError(Exception):
    """Skip one file: `reason` ends the sentence that the file's name starts."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
