"""Processes of train.py with its libraries already imported, if the platform can fork."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_IMPORTED = [
    "train",
    "scripts.quiet",
    "trainer.run.lifecycle",
    "trainer.planning.check",
    "trainer.optim.dadapt.optimizer",
    "tensorboard.summary.writer.record_writer",
    "torch.utils.tensorboard.summary",
]
"""Imported before a child is forked: it then starts in one second instead of ten."""


def started(
    arguments: Sequence[str], output: Path, target: Callable[[list[str], str], None] | None = None
) -> BaseProcess:
    """Start train.py in a new process and append its output to a file; `target` replaces `run_train`."""
    child = quick_context().Process(target=target or run_train, args=(list(arguments), str(output)))
    child.start()
    return child


def quick_context() -> Any:
    """Return a context whose processes have the libraries imported, if possible; not for CUDA."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(_IMPORTED)
    return context


def run_train(arguments: list[str], output: str) -> None:
    """Run train.py and end this process."""
    os._exit(train_into(arguments, output))


def train_into(arguments: list[str], output: str) -> int:
    """Run train.py in this process, append its output to a file, and return its exit code."""
    with Path(output).open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        usual = multiprocessing.get_all_start_methods()[0]  # for its DataLoader workers
        multiprocessing.set_start_method(usual, force=True)
        import train

        code = train.main(arguments)
        file.flush()
    return code
