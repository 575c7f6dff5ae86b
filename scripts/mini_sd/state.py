"""Resumable training state: a killed stage resumes exactly."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch


class Stateful(Protocol):
    """An object with a state dict: a module or an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state."""
        ...


class Run:
    """One stage's progress: named parts, the step reached and the CPU seconds spent.

    Generators are seeded by (stage, step), so the step is the whole position.
    """

    def __init__(self, path: Path, parts: dict[str, Stateful], save_every_s: float = 120.0) -> None:
        """Resume from `path` if it exists; the file there is always whole."""
        self.path = path
        self.parts = parts
        self.step = 0
        self.cpu_s = 0.0
        self.losses: list[tuple[int, float]] = []
        self._save_every_s = save_every_s
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            self.step, self.cpu_s, self.losses = state["step"], state["cpu_s"], state["losses"]

    def save(self) -> None:
        """Write everything next to `path`, then move it there."""
        state = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "step": self.step,
            "cpu_s": self.cpu_s,
            "losses": self.losses,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def advance(
        self, total: int, train_step: Callable[[int], float], stop_at: int | None = None, label: str = ""
    ) -> bool:
        """Run `train_step(step)` until `total` (or `stop_at`, for tests); return True at `total`.

        The state is saved every two minutes and at the end.
        """
        last = total if stop_at is None else min(total, stop_at)
        if self.step >= last:
            return self.step >= total
        saved_at, mark, before = time.monotonic(), time.process_time(), self.cpu_s
        recent: list[float] = []
        while self.step < last:
            recent.append(train_step(self.step))
            self.step += 1
            self.cpu_s = before + time.process_time() - mark
            if self.step % 100 == 0 or self.step == last:
                mean = sum(recent) / len(recent)
                self.losses.append((self.step, mean))
                print(f"{label} step {self.step}/{total} loss {mean:.5f} cpu {self.cpu_s:.0f} s", flush=True)
                recent.clear()
            if time.monotonic() - saved_at > self._save_every_s:
                self.save()
                saved_at = time.monotonic()
        self.save()
        return self.step >= total
