"""The memory estimate: peak memory before a run starts, and what would save some where it does not fit."""

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
from trainer.planning.memory_trace import Phase, Work, footprint
from trainer.training.precision import Precision

CONTEXT = 3 << 28
"""Bytes that the CUDA context and libraries are assumed to take beyond torch's allocator.

Measured on an H100: 0.75 to 0.78 GiB."""

SLACK = 0.05
"""Share of the tensors' bytes that CUDA's allocator is assumed to hold unused.

Measured on an H100: 2 to 12%, median 5.4%."""


@dataclass(frozen=True)
class Estimate:
    """What a run will hold in memory, thing by thing."""

    phases: Sequence[Phase]
    """What the run does in turn, each at its peak."""
    device: str
    """cuda or cpu."""
    beside: int
    """Bytes beside tensors: assumed on CUDA, on the CPU those of the process before the run."""
    holds: int | None
    """Bytes of the device, None if that is not to be told."""
    spared: Sequence[tuple[str, int]] = ()
    """Where it does not fit: changes of the configuration, cheapest first, each with the peak it leads to."""

    @property
    def largest(self) -> Phase:
        """What takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of the device at the peak of the whole run."""
        return _peak(self.phases, self.device, self.beside)

    @property
    def fits(self) -> bool:
        """Whether that is at most what the device holds."""
        return self.holds is None or self.peak <= self.holds

    def lines(self) -> list[str]:
        """Return a table and what follows from it."""
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
            "cpu": "Python and its libraries",
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
        """Return the same as JSON holds it, in bytes."""
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
        device = "card" if self.device == "cuda" else "main memory that are available"
        of = f"the {self.holds / _GIB:.1f} GiB of the {device}"
        if self.fits:
            return [f"fits into {of}"]
        lines = [f"does not fit into {of}; what would spare memory, the cheapest first:"]
        for sentence, peak in self.spared:
            lines.append(
                f"  {sentence} Then {peak / _GIB:.1f} GiB{', which fits.' if peak <= self.holds else '.'}"
            )
        if not self.spared or self.spared[-1][1] > self.holds:
            lines.append("  Beyond that: a device with more memory.")
        return lines


_GIB = 2**30


_WORTH_IT = 0.99
"""A change is proposed if it leaves at most this share of the peak."""


def estimate(
    config: TrainConfig, models: Models, precision: Precision, work: Work, *, holds: int | None
) -> Estimate:
    """Return what a run will hold in memory at most, and if that is too much, what would spare some.

    Args:
        config: the run's.
        models: the networks, of which the configurations alone are used.
        precision: the device's type, which need not be there, and number format.
        work: what the run does.
        holds: the bytes of the device, None if nobody asks.

    Raises:
        UserError: an optimizer's library is not there.
    """
    device = "cuda" if precision.device.type == "cuda" else "cpu"
    beside = CONTEXT if device == "cuda" else psutil.Process().memory_info().rss
    found = Estimate(footprint(config, models, precision, work), device, beside, holds)
    if found.fits or holds is None:
        return found
    spared: list[tuple[str, int]] = []
    now, peak = config, found.peak
    for change in CHANGES:
        while peak > holds and (proposed := change(now)) is not None:
            sentence, changed = proposed
            less = footprint(changed, models, _with_weights(precision, changed), _with_less(work, changed))
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
    """Return what a run does, as far as its memory depends on it.

    Args:
        config: the run's.
        index: the images that are trained.
        sampler: draws the run's samples.
        latents_kept: whether images are encoded before training.
        trains_text: whether the text encoder learns.
        held_out: images and timesteps that are measured at a time, 0 if none are held out.
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
    return tensors + beside + (round(SLACK * tensors) if device == "cuda" else 0)


def _with_less(work: Work, config: TrainConfig) -> Work:
    """Return what a run of a changed configuration does."""
    resolution = max(config.data.resolutions)
    large = work.size[0] * work.size[1] > resolution**2
    return replace(
        work,
        size=nearest(*work.size, buckets(resolution)) if large else work.size,
        images=min(work.images, config.data.batch_size),
        latents_kept=work.latents_kept or config.cache.cache_latents == "disk",
    )


def _with_weights(precision: Precision, config: TrainConfig) -> Precision:
    """Return the precision with weights in the configuration's format."""
    if config.precision.weights_dtype == "fp32" or precision.weights == torch.bfloat16:
        return precision
    return replace(precision, weights=torch.bfloat16, dtype=torch.bfloat16)
