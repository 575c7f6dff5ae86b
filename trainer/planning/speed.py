"""The training time of a model of full size without a GPU."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import TrainConfig
from trainer.models.pipeline import Models

_FULL_SIZE = 200_000_000
"""Parameters of a UNet that no CPU trains in an evening."""

_SHARE = 0.7
"""Speed of a UNet's passes as a share of that of a matrix product; 0.66 to 0.86 were measured for SD 1.5 at
512 px (docs/evidence.md)."""


def slow_on_cpu(config: TrainConfig, models: Models, images: int) -> str | None:
    """Return a warning with the estimated training time on this CPU; None for a small model.

    Args:
        config: the run's.
        models: on the meta device.
        images: showings of the whole run.
    """
    if sum(parameter.numel() for parameter in models.unet.parameters()) < _FULL_SIZE:
        return None
    passes = 4 if config.parts.gradient_checkpointing else 3  # backward takes two, recomputing one more
    work = passes * _forward(models, max(config.data.resolutions))
    speed = product_speed()
    hours = images * work / (_SHARE * speed) / 3600
    duration = f"{hours / 24:,.0f} days" if hours >= 36 else f"{max(1, hours):.0f} hours"
    return (
        f"there is no GPU, and on this CPU the training takes about {duration}: {images:,} images at "
        f"{work / 1e12:.1f} TFLOP each, with {speed / 1e9:.0f} GFLOP/s in a matrix product just now. "
        "Use a GPU (docs/memory.md has Colab), or try models/mini-sd, which is made for CPUs"
    )


def product_speed() -> float:
    """Return the operations per second of a matrix product on this CPU, the best of three."""
    side = 1024
    left, right = torch.rand(side, side), torch.rand(side, side)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _forward(models: Models, resolution: int) -> float:
    """Return the operations of the UNet's forward pass on one square image."""
    width: int = models.text_encoder.config.hidden_size
    latents = torch.empty(1, 4, resolution // 8, resolution // 8, device="meta")
    context = torch.empty(1, 77, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.unet(latents, torch.empty(1, device="meta"), context)
    return counter.get_total_flops()
