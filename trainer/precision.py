"""Numeric precision of the forward and backward pass, and memory layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """In which number format the networks compute; weights and optimizer state stay fp32."""

    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Autocast type: auto is bf16 where the device computes it natively, else fp16 on CUDA, and no on the CPU."""

    disable_amp: bool = False
    """Compute in fp32; the same as mixed_precision: no."""

    channels_last: bool = True
    """Store convolution weights and images channels last, which convolutions run faster with."""
