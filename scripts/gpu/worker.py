"""One process for each step of the report, so that a step that hangs or crashes ends alone and memory is counted from nothing."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.gpu.job import Job, Result

_IMPORTED = (
    "scripts.quiet",
    "torch._dynamo",
    "torch.profiler",
    "transformers.models.clip.modeling_clip",
    "diffusers.configuration_utils",
)
"""Imported while the step before is still running. diffusers' models are not: with them comes bitsandbytes, which takes GPU memory."""


class Workers:
    """Runs steps one after the other; the process of the next step imports its libraries during the one before.

    Args:
        device: cuda or cpu.
    """

    def __init__(self, device: str) -> None:
        if device == "cpu":
            from scripts.processes import quick_context

            self._context: Any = quick_context()
        else:
            self._context = multiprocessing.get_context("spawn")
        self._now = self._next = self._start()

    def run(
        self, function: str, job: Job, limit: float, tell: Callable[[Result], None], *, last: bool
    ) -> tuple[str, str]:
        """Run a step and return its status (ok, failed or stopped) and a reason.

        Args:
            function: module and name, separated by a colon.
            job: its argument.
            limit: seconds after which it is stopped.
            tell: takes its results as they come.
            last: whether no further step follows.
        """
        process, pipe = self._now = self._next
        if not last:
            self._next = self._start()
        pipe.send((function, job))
        ends = time.monotonic() + limit
        try:
            while pipe.poll(max(0.0, ends - time.monotonic())):
                kind, value = pipe.recv()
                if kind == "result":
                    tell(value)
                else:
                    return kind, value
            return "stopped", f"not finished after {limit:.0f} s"
        except EOFError:
            process.join(5)
            return "failed", f"its process ended with status {process.exitcode}"
        finally:
            _end(process)

    def close(self) -> None:
        """End the process of the step and the one that waits."""
        for process, _ in (self._now, self._next):
            _end(process)

    def _start(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,))
        process.start()
        theirs.close()
        return process, ours


def serve(pipe: Any) -> None:
    """Be the process of one step."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that processes of its own end with it
    for name in _IMPORTED:
        importlib.import_module(name)
    try:
        function, job = pipe.recv()
    except EOFError:
        return
    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _print_to(job.folder / "output.log")
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(job, lambda result: pipe.send(("result", result)))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {str(error).strip() or 'no message'}"))
    else:
        pipe.send(("ok", ""))
    sys.stdout.flush()
    os._exit(0)  # without waiting for compilers' and readers' processes


def _print_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8", buffering=1)  # lines are there when the process is killed
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    sys.stdout = sys.stderr = file


def _end(process: Any) -> None:
    """Kill a process and those it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg") and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)
