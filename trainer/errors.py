"""`UserError`, which is shown as plain sentences; any other exception is a bug and keeps its traceback."""

from __future__ import annotations

from data.errors import UserError

__all__ = ["UserError", "said"]


def said(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
