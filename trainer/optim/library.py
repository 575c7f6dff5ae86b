"""The error for an optimizer whose library is not installed."""

from __future__ import annotations

from trainer.errors import UserError


def does_not_load(optimizer: str, library: str, error: Exception, instead: str) -> UserError:
    """Return the error for an optimizer whose library raised `error` at import."""
    return UserError(
        f"optimizer {optimizer}: {library} does not load ({error}); install it with `pip install "
        f"{library}`, or choose optimizer {instead}."
    )
