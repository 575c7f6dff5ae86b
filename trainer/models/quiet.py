"""Keeping the libraries' own chatter off the console: what matters reaches people through errors and events."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Silence notices and progress bars of diffusers, transformers, huggingface_hub and bitsandbytes; errors still show.

    Call it before anything else imports diffusers: some notices are printed by the import itself. Calling it
    again costs nothing.
    """
    # bitsandbytes is imported by the other libraries and logs, as it loads, that an optional 4-bit kernel is
    # missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
