"""The memory estimate: peak memory before a run starts, and changes that lower it if it does not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from data.buckets import buckets, nearest
from data.dataset import shown_captions
from data.index import Index
from trainer.config.schema import TrainConfig
from trainer.evaluation.fixed_noise import TIMESTEPS
from trainer.evaluation.sampling import Sampler
from trainer.models.pipeline import Models
from trainer.planning.memory_advice import CHANGES
from trainer.planning.memory_ledger import COLUMNS, KINDS
from trainer.planning.memory_trace import Phase, Work, trace_memory
from trainer.training.precision import Precision

CONTEXT = 3 << 28
"""Bytes that the CUDA context and libraries are assumed to take beyond torch's allocator.

Measured on an H100: 0.75 to 0.78 GiB."""

KEPT = 1 << 28
"""Bytes of freed blocks that malloc is assumed to keep on a CPU.

Measured as what `malloc_trim` gives back: 0.16 GiB with the bundled model, 0.21 to 0.32 GiB at full size."""

SLACK = 0.05
"""Share of the tensors' bytes that CUDA's allocator is assumed to hold unused.

Measured on an H100: 2 to 12%, median 5.4%."""


@dataclass(frozen=True)
class Estimate:
    """The peak memory of a run, by phase."""

    phases: Sequence[Phase]
    device: str
    """cuda or cpu."""
    beside: int
    """Bytes beside tensors: assumed on CUDA, on the CPU those of the process before the run."""
    holds: int | None
    """Memory of the device in bytes; None if unknown."""
    spared: Sequence[tuple[str, int]] = ()
    """If it does not fit: changes of the configuration, cheapest first, and the peak after each."""

    @property
    def largest(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of the device at the peak of the whole run."""
        return _peak(self.phases, self.device, self.beside)

    @property
    def fits(self) -> bool:
        """True if the peak is at most the device's memory, or that is unknown."""
        return self.holds is None or self.peak <= self.holds

    def lines(self) -> list[str]:
        """Return a table and its verdict."""
        phase = self.largest
        name, unit = ("GiB", 2**30) if self.peak >= 2**30 else ("MiB", 2**20)
        table: list[tuple[str, list[str]]] = [(f"memory, {name}", [*COLUMNS])]
        for kind in KINDS:
            sizes = [phase.of(kind, network) for network in COLUMNS]
            if any(size >= unit // 100 for size in sizes):
                table.append((kind, [f"{size / unit:.2f}" if size >= unit // 100 else "" for size in sizes]))
        lines = [f"{kind:<22}{''.join(f'{cell:>14}' for cell in cells)}".rstrip() for kind, cells in table]
        beside = {
            "cuda": "assumed: the CUDA context and workspaces, "
            f"and {SLACK:.0%} that the allocator holds unused",
            "cpu": "Python and its libraries, and freed memory that is assumed to be kept",
        }[self.device]
        others = "".join(
            f", {other.name} {other.total / unit:.1f}" for other in self.phases if other is not phase
        )
        return [
            *lines,
            f"{'beside tensors':<22}{(self.peak - phase.total) / unit:>14.2f}  {beside}",
            f"peak: {self.peak / unit:.1f} {name}, in the {phase.name} "
            f"(tensors alone: {phase.total / unit:.1f}{others})",
            *self._verdict(),
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the same as JSON values, in bytes."""
        phases = {
            phase.name: {
                f"{kind}, {network}": size for (kind, network), size in phase.bytes_by_kind.items() if size
            }
            for phase in self.phases
        }
        spared = [{"change": sentence, "peak": peak} for sentence, peak in self.spared]
        return {"peak": self.peak, "holds": self.holds, "fits": self.fits, "phases": phases, "spared": spared}

    def _verdict(self) -> list[str]:
        if self.holds is None:
            return []
        device = "GPU" if self.device == "cuda" else "main memory that are available"
        of = f"the {self.holds / _GIB:.1f} GiB of the {device}"
        if self.fits:
            tight = self.device == "cuda" and self.peak > (1 - SLACK) * self.holds
            return [f"fits into {of}{', if no desktop or other program takes any' if tight else ''}"]
        lines = [f"does not fit into {of}; what would spare memory, the cheapest first:"]
        for sentence, peak in self.spared:
            fits = ", which fits." if peak <= self.holds else "."
            lines.append(f"  {sentence} Then {peak / _GIB:.1f} GiB{fits}")
        if not self.spared or self.spared[-1][1] > self.holds:
            lines.append("  Beyond that: a device with more memory.")
        return lines


_GIB = 2**30

_WORTH_IT = 0.99
"""A change is proposed if it leaves at most this share of the peak."""


def estimate(
    config: TrainConfig, models: Models, precision: Precision, work: Work, *, holds: int | None
) -> Estimate:
    """Return the peak memory of a run, and changes that lower it if it exceeds the `holds` bytes given.

    Of `models` only configurations are used; the precision's device need not exist.
    """
    device = "cuda" if precision.device.type == "cuda" else "cpu"
    beside = CONTEXT if device == "cuda" else psutil.Process().memory_info().rss
    found = Estimate(trace_memory(config, models, precision, work), device, beside, holds)
    if found.fits or holds is None:
        return found
    spared: list[tuple[str, int]] = []
    now, peak = config, found.peak
    for change in CHANGES:
        while peak > holds and (proposed := change(now)) is not None:
            sentence, changed = proposed
            less = trace_memory(changed, models, _with_weights(precision, changed), _with_less(work, changed))
            after = _peak(less, device, beside)
            if after > peak * _WORTH_IT:
                break
            spared.append((sentence, after))
            now, peak = changed, after
    return replace(found, spared=spared)


def work_of(
    config: TrainConfig,
    index: Index,
    sampler: Sampler,
    *,
    latents_kept: bool,
    trains_text: bool,
    held_out: int,
) -> Work:
    """Return the sizes and batches that a run's memory depends on.

    `held_out` is the batch of the validation loss: images times timesteps, 0 without.
    """
    shown: dict[tuple[int, int], float] = {}
    for record in index.records:
        for resolution in config.data.resolutions:
            bucket = nearest(record.width, record.height, buckets(resolution))
            shown[bucket] = shown.get(bucket, 0.0) + record.multiply
    most = {
        bucket: min(config.data.batch_size, math.ceil(times)) for bucket, times in shown.items() if times > 0
    }
    size, images = max(most.items(), key=lambda entry: entry[0][0] * entry[0][1] * entry[1])
    fixed = 1 if config.fixed_loss.fixed_loss_images else 0
    held = max(1, held_out // TIMESTEPS) if held_out else 0
    sample, pictures = sampler.largest()
    return Work(
        size=size,
        images=images,
        latents_kept=latents_kept,
        contexts_kept=latents_kept and not trains_text and shown_captions(index, config.data) is not None,
        evaluated=TIMESTEPS * max(fixed, held),
        sample=sample,
        sampled=pictures,
    )


def size_of_device(precision: Precision) -> int:
    """Return the bytes of the training device: all GPU memory, or available main memory."""
    if precision.device.type != "cuda":
        return psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return torch.cuda.mem_get_info(precision.device)[1]


def _peak(phases: Sequence[Phase], device: str, beside: int) -> int:
    tensors = max(phase.total for phase in phases)
    return tensors + beside + (round(SLACK * tensors) if device == "cuda" else KEPT)


def _with_less(work: Work, config: TrainConfig) -> Work:
    """Return the work of a run with a changed configuration."""
    resolution = max(config.data.resolutions)
    large = work.size[0] * work.size[1] > resolution**2
    return replace(
        work,
        size=nearest(*work.size, buckets(resolution)) if large else work.size,
        images=min(work.images, config.data.batch_size),
        latents_kept=work.latents_kept or config.cache.cache_latents == "disk",
    )


def _with_weights(precision: Precision, config: TrainConfig) -> Precision:
    """Return the precision with weights in the configuration's dtype."""
    if config.precision.weights_dtype == "fp32" or precision.weights == torch.bfloat16:
        return precision
    return replace(precision, weights=torch.bfloat16, dtype=torch.bfloat16)
