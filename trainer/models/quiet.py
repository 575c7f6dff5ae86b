"""Silence for the libraries' own notices."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Silence notices and progress bars of diffusers, transformers and huggingface_hub; errors still show."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
