"""train.py in processes of its own that find its libraries imported already, where the platform can."""

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
    "data.loader",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers",
    "tensorboard.summary.writer.record_writer",
    "torch.utils.tensorboard.summary",
    "trainer.planning.check",
    "trainer.evaluation.image_grid",
    "trainer.models.checkpoint_file",
    "trainer.models.folder",
    "trainer.optim.dadapt.optimizer",
    "trainer.evaluation.sampling",
    "trainer.checkpoints.saver",
    "trainer.training.step",
]
"""What children find imported already, where the platform can: a start then takes a second instead of ten."""


def started(
    arguments: Sequence[str], output: Path, target: Callable[[list[str], str], None] | None = None
) -> BaseProcess:
    """Start train.py in a process of its own, its output added to a file.

    Args:
        arguments: its command line.
        output: the file.
        target: what the process does with both, `run_train` unless something else is named.
    """
    child = quick_context().Process(target=target or run_train, args=(list(arguments), str(output)))
    child.start()
    return child


def quick_context() -> Any:
    """Return what makes processes that find the libraries imported, where the platform can; not for processes that use CUDA."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(_IMPORTED)
    return context


def run_train(arguments: list[str], output: str) -> None:
    """Be train.py."""
    os._exit(train_into(arguments, output))


def train_into(arguments: list[str], output: str) -> int:
    """Run train.py in this process, add all that it prints to a file, and return its exit code."""
    with Path(output).open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        multiprocessing.set_start_method(
            multiprocessing.get_all_start_methods()[0], force=True
        )  # the platform's own, for its workers
        import train

        code = train.main(arguments)
        file.flush()
    return code
