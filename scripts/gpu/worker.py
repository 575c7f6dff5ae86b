"""A process for each step: a hang or crash ends that step alone, and its memory starts from zero."""

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
"""Imported during the previous step; not diffusers' models, whose bitsandbytes takes GPU memory."""


class Workers:
    """Runs steps one after the other; the next step's process imports its libraries meanwhile."""

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

        `function` is "module:name"; `limit` is in seconds; after the `last` step no process is started.
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
        """End the current step's process and the waiting one."""
        for process, _ in (self._now, self._next):
            _end(process)

    def _start(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,))
        process.start()
        theirs.close()
        return process, ours


def serve(pipe: Any) -> None:
    """Run one step in this process, then end it."""
    if hasattr(os, "setsid"):
        os.setsid()  # its child processes end with it
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
    os._exit(0)  # waits for no child process


def _print_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8", buffering=1)  # complete lines even after a kill
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    sys.stdout = sys.stderr = file


def _end(process: Any) -> None:
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg") and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)
