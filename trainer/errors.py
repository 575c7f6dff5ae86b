"""`UserError`, which is shown as plain sentences; any other exception is a bug and keeps its traceback."""

from __future__ import annotations

from data.errors import UserError

__all__ = ["UserError", "first_line", "said"]


def said(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
