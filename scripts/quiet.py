"""Importing this silences the libraries, for processes that import them before any of our code runs."""

from trainer.models.quiet import quiet_libraries

quiet_libraries()
