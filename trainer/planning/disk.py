"""The disk space that a run's checkpoints take, and how long a save takes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.atomic import free_bytes, in_gib, writing_speed
from trainer.checkpoints.artifact import Artifact
from trainer.checkpoints.export import size_beside
from trainer.checkpoints.options import SaveOptions
from trainer.config.schema import TrainConfig
from trainer.models.pipeline import Part
from trainer.networks import by_network
from trainer.optim import OptimizerOptions
from trainer.state_file import size_of_state


@dataclass(frozen=True)
class DiskPlan:
    """The disk space of a run's checkpoints, in bytes."""

    options: SaveOptions
    folder: int
    """A diffusers folder, with EMA weights if they lie inside."""
    single: int
    """The single files of one checkpoint; 0 without."""
    resume: int
    """The resume state of one checkpoint."""
    saves: int
    """Number of checkpoints by epochs, the last one included."""
    beside: int = 0
    """Further parts of the base's pipeline, which the run keeps once."""

    @property
    def checkpoint(self) -> int:
        """Bytes that one save writes."""
        return self.folder + self.single + self.resume

    @property
    def most(self) -> int:
        """Peak bytes: all kept checkpoints and one more, since deletion follows a whole save."""
        options = self.options
        models = min(self.saves, options.keep_last_n or self.saves)
        resumable = models if options.save_optimizer else min(models, options.keep_resume_n)
        folders = resumable if options.save_format == "single" else models
        dropped = models < self.saves or resumable < models
        if options.keep_best:
            folders, models = folders + 1, models + 1
        kept = folders * self.folder + models * self.single + resumable * self.resume
        return kept + (self.checkpoint if dropped else 0) + self.beside

    def shortage(self, logdir: Path, *, resumed: bool) -> str | None:
        """Return a sentence if the disk lacks the space for the checkpoints that are still to come."""
        own = replace(self, single=0) if self.options.save_ckpt_dir else self
        needed, free = own.checkpoint if resumed else own.most, free_bytes(logdir)
        if free > needed:
            return None
        count = "the next checkpoint" if resumed or self.saves == 1 else f"{self.saves} checkpoints"
        return (
            f"disk: {in_gib(needed)} are needed for {count} and {in_gib(free)} are free where logdir is; "
            "make space while the run trains, or set save_format or keep_last_n"
        )

    def rows(self, logdir: Path) -> list[tuple[str, str]]:
        """Return the plan in words, with the duration of a save if a probe can be written."""
        minutes = self.options.ckpt_every_n_minutes
        more = f", and one every {minutes:g} minutes" if minutes else ""
        sizes = {"the folder": self.folder, "single files": self.single, "to resume from it": self.resume}
        parts = " + ".join(f"{in_gib(size)} {name}" for name, size in sizes.items() if size)
        free = free_bytes(logdir)
        full = "" if free > self.most else ": not enough"
        most = f"{in_gib(self.most)} for {self.saves} of them{more}, of {in_gib(free)} that are free{full}"
        saving = f"{in_gib(self.checkpoint)}: {parts}; {self._time(logdir)}"
        return [("a checkpoint", saving), ("disk", most)]

    def _time(self, logdir: Path) -> str:
        try:
            speed = writing_speed(logdir)
        except OSError as error:
            return f"how long a save takes could not be measured ({error.strerror or error})"
        seconds = self.checkpoint / speed + (self.folder + self.resume) / hashing_speed()
        wait, rate = max(seconds, 0.1), speed / 1e6
        return f"training waits {wait:.1f} s or more for it, at the {rate:,.0f} MB/s of a probe just now"


def plan_disk(
    config: TrainConfig, artifact: Artifact, counts: Mapping[str, Part], weights: torch.dtype
) -> DiskPlan:
    """Return the disk space of checkpoints of `artifact`, with trained networks in the dtype `weights`."""
    options = config.saving
    optimizers = by_network(config.optimizers)
    trained = {network: part.trained for network, part in counts.items() if part.trained}
    copies = 2 if config.ema.active else 1
    single = artifact.file_bytes(torch.float32 if options.save_full_precision else torch.float16)
    state = sum(count * state_bytes(optimizers[network]) for network, count in trained.items())
    every, first = options.save_every_n_epochs, options.save_ckpts_from_n_epochs
    scheduled = (
        [epoch for epoch in range(every, config.loop.max_epochs, every) if epoch >= first] if every else []
    )
    return DiskPlan(
        options=options,
        folder=artifact.folder_bytes(weights) * (1 if options.writes_single else copies),
        single=single * copies if options.writes_single else 0,
        resume=round(state) + (4 * sum(trained.values()) if config.ema.active else 0),
        saves=len(scheduled) + 1,
        beside=size_beside(artifact.models),
    )


def state_bytes(options: OptimizerOptions) -> float:
    """Return an optimizer's bytes of state per element, measured on a weight of 65,536 after a step."""
    parameter = torch.nn.Parameter(torch.ones(256, 256))
    optimizer = options.build([parameter], options.lr or 1.0)
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return size_of_state(optimizer.state_dict()["state"]) / parameter.numel()


def hashing_speed(size: int = 1 << 24) -> float:
    """Return bytes per second of SHA-256 on this machine."""
    block = bytes(size)
    began = time.perf_counter()
    hashlib.sha256(block).digest()
    return size / (time.perf_counter() - began)
