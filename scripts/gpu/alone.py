"""Steps of each optimizer alone, without a network, against the bandwidth floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from scripts.bench.optimizers import prepared, random_gradients, shapes, state_bytes
from scripts.bench.rounds import timed
from scripts.gpu.job import Job, Result

ALONE = (
    "dadapt_adam8bit+fused",
    "dadapt_adam8bit",
    "adamw8bit",
    "adamw8bit_fused",
    "dadapt_adam",
    "adamw",
    "dadapt_adam_reference",
)
"""The most informative first."""


def alone(job: Job, tell: Callable[[Result], None]) -> None:
    """Time steps on Stable Diffusion 1.5's parameters, fp32 weights and random gradients."""
    sizes = shapes("mini" if job.tiny else "both")[:: 20 if job.tiny else 1]
    gradients = random_gradients(sizes, job.device, torch.float32)
    numel = sum(size.numel() for size in sizes)
    for name in ALONE:
        optimizer, step = prepared(name, gradients)
        first = timed(step, job.device)["wall"]
        for _ in range(2):
            step()
        found = [timed(step, job.device) for _ in range(1 if job.tiny else 7)]
        wall, host = (1e3 * statistics.median(each[key] for each in found) for key in ("wall", "host"))
        state = state_bytes(optimizer)
        tell(
            {"kind": "alone", "optimizer": name, "trained": numel, "state": state, "first": first}
            | {"whole": wall, "host": host}
        )
        del optimizer, step
