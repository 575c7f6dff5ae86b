"""Optimizers of kept libraries that are asked for and not there."""

from __future__ import annotations

from trainer.errors import UserError


def does_not_load(optimizer: str, library: str, error: Exception, instead: str) -> UserError:
    """Return what to tell the user whose optimizer's library raised `error` while it was imported."""
    return UserError(
        f"optimizer {optimizer}: {library} does not load ({error}); install it with `pip install "
        f"{library}`, or choose optimizer {instead}."
    )
