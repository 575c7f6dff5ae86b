"""Silence the libraries on import, in processes that import them before the program's code runs."""

from trainer.models.quiet import quiet_libraries

quiet_libraries()
