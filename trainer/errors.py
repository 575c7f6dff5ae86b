"""The two kinds of failure: a `UserError` is shown as plain sentences; anything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence


def said(error: Exception) -> str:
    """Return what an error says in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class UserError(Exception):
    """Stop with plain sentences: something in the configuration, the data or the environment must change.

    Args:
        problems: one sentence or several; each says where, what was found, what is accepted and what to do.
        exit_code: the process's exit status, 2 unless the run had already begun.
    """

    def __init__(self, problems: str | Sequence[str], *, exit_code: int = 2) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.exit_code = exit_code
        super().__init__("\n".join(self.problems))
