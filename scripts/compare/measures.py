"""The numbers of finished runs, read from their folders."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.compare.drift import Shift, Tone
from scripts.compare.runs import Finished, Planned
from trainer.reporting.tags import IMAGES_PER_SECOND, MINUTES_PER_EPOCH, VRAM, current

Curve = Mapping[int, float]
"""Values by optimizer step."""


@dataclass(frozen=True)
class Measured:
    """A run in numbers; None if the run does not have one."""

    end: Finished
    curves: Mapping[str, Curve]
    """By TensorBoard tag."""

    checkpoint: Path | None
    """The folder of the last checkpoint, or the single file if no folder was kept."""

    minutes: float | None
    """The median epoch, without samples, validation and checkpoints."""

    images: float | None
    """Images a second: the median over reports but the first, which includes one-time work."""

    memory: float | None
    """Peak GiB: of tensors on CUDA, else of the process."""

    state: float | None
    """Bytes of optimizer state for each trained parameter."""

    size: float | None
    """MiB of the last checkpoint (folder, single file, or both) without its resume state."""

    def final(self, tag: str) -> float | None:
        """Return the last value of a curve."""
        curve = self.curves.get(tag)
        return curve[max(curve)] if curve else None

    def best(self, tag: str) -> float | None:
        """Return the lowest value of a curve after the first step."""
        values = [
            value for step, value in self.curves.get(tag, {}).items() if step > 0 and math.isfinite(value)
        ]
        return min(values) if values else None


@dataclass(frozen=True)
class Compared:
    """An optimizer file with its runs, one for each seed."""

    label: str
    runs: tuple[Measured, ...]
    shifts: tuple[tuple[tuple[int, Shift], ...], ...] = ()
    """For each finished run, unrelated prompts by index and the distance of their samples to the base's."""

    tones: tuple[Tone, ...] = ()
    """Of the unrelated prompts' samples, for each run that finished."""

    @property
    def failed(self) -> list[str]:
        """Reasons of failed runs, one sentence each."""
        return [f"seed {run.end.planned.seed}: {run.end.reason}" for run in self.runs if run.end.code]

    def over_seeds(self, of: Callable[[Measured], float | None]) -> list[float]:
        """Return a number of each finished run that has it."""
        return [value for run in self.runs if not run.end.code and (value := of(run)) is not None]

    def curve(self, tag: str) -> dict[int, tuple[float, float, float]]:
        """Return mean, lowest and highest over seeds at every step at which all curves are finite."""
        found = [run.curves[tag] for run in self.runs if run.curves.get(tag)]
        curves = [{step: value for step, value in curve.items() if math.isfinite(value)} for curve in found]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        points = {step: [curve[step] for curve in curves] for step in steps}
        return {step: (statistics.fmean(values), min(values), max(values)) for step, values in points.items()}


def networks_of(files: Sequence[Compared], prefix: str) -> list[str]:
    """Return the networks, as tags name them, of which any run has a curve."""
    tags = [
        tag.removeprefix(prefix)
        for file in files
        for run in file.runs
        for tag in run.curves
        if tag.startswith(prefix)
    ]
    return list(dict.fromkeys(tags))


def measure(end: Finished, trained: Mapping[str, int]) -> Measured:
    """Read a finished run; `trained` is the number of trained parameters by network."""
    curves = read_curves(end.folder) if end.folder is not None else {}
    images = list(curves.get(IMAGES_PER_SECOND, {}).values())[1:]
    minutes = list(curves.get(MINUTES_PER_EPOCH, {}).values())
    vram = curves.get(VRAM, {})
    memory = max(vram.values()) if vram else None if end.peak is None else end.peak / 2**30
    checkpoint = last_checkpoint(end.folder) if end.folder is not None else None
    size = None if checkpoint is None or end.folder is None else _size(end.folder, checkpoint) / 2**20
    return Measured(
        end=end,
        curves=curves,
        checkpoint=checkpoint,
        minutes=statistics.median(minutes) if minutes else None,
        images=statistics.median(images) if images else None,
        memory=memory,
        state=_state_bytes(checkpoint, trained) if checkpoint is not None else None,
        size=size,
    )


def trained_parameters(run: Planned) -> dict[str, int]:
    """Return the number of trained parameters of each network, without reading weights.

    Raises:
        UserError: the model is gone.
    """
    from trainer.config import load_config
    from trainer.models.load import describe
    from trainer.models.trainable import apply_freezing

    config = load_config(run.arguments).config
    parts = apply_freezing(describe(config.model), config.parts, config.optimizers.freezing)
    return {network: part.trained for network, part in parts.counts.items()}


def read_curves(run: Path) -> dict[str, Curve]:
    """Return all scalars of a run by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {
        current(tag): {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if "/log10 " not in tag
    }


def last_checkpoint(run: Path) -> Path | None:
    """Return the folder of a run's last checkpoint, else its single file, else None."""
    from trainer.checkpoints.listing import checkpoints, single_files

    return next(iter([*checkpoints(run), *single_files(run / "ckpts", run.name)]), None)


def _size(run: Path, checkpoint: Path) -> int:
    """Return the bytes of a checkpoint with its single file, without its resume state."""
    from trainer.checkpoints.listing import single_files

    files = [
        path
        for path in checkpoint.rglob("*")
        if path.is_file() and "resume" not in path.relative_to(checkpoint).parts
    ]
    single = single_files(run / "ckpts", run.name)[:1]
    return sum(
        path.stat().st_size for path in {*files, *single, *([checkpoint] if checkpoint.is_file() else [])}
    )


def _state_bytes(checkpoint: Path, trained: Mapping[str, int]) -> float | None:
    """Return the bytes of optimizer state in a checkpoint for each trained parameter."""
    from trainer.models.tensor_file import TensorFile

    path = checkpoint / "resume" / "training.safetensors"
    if not path.is_file() or not sum(trained.values()):
        return None
    header = TensorFile(path)
    sizes = [
        tensor.numel() * tensor.element_size()
        for name, tensor in header.items()
        if name.startswith("state.optimizers.")
    ]
    return sum(sizes) / sum(trained.values())


def settings_of(run: Planned) -> str:
    """Return the keys of a run's data and length with their values, as in JSON."""
    keys = (
        "resume_ckpt",
        "data_root",
        "max_epochs",
        "batch_size",
        "grad_accum",
        "resolution",
        "mixed_precision",
    )
    shown = {key: run.config.get(key) for key in keys}
    return ", ".join(f"{key} {json.dumps(_named(value))}" for key, value in shown.items())


def _named(value: object) -> object:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
