"""Eight-bit storage of optimizer state: one byte for each element and one fp32 scale for each block of `BLOCK` elements.

A code k of n levels stands for y(k / n) times the block's scale, where y is the fourth power with straight lines between the powers of
two: the bits of a float, read as an integer, are its logarithm in straight pieces, and four times that is the fourth power's. So
neither direction needs a root or a table. Steps are 1 to 3% of the value for the upper four octaves of an unsigned block (3 to 6%
signed), twice that for the next four, and so on down to 2^-32 (2^-28) of the largest value.

Rounding is stochastic, since a running mean with beta 0.999 moves by less than a step at a time and would never leave its code. The
straight pieces make it unbiased: between neighbouring codes above 2^-20 of the largest value, the mean of what is stored is the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale."""

_ONE = 127 << 23
"""The bits of 1.0 in fp32."""

# What the largest code stands for: y(127 / 128) and y(255 / 256).
_TOP_SIGNED = 31 / 32
_TOP_UNSIGNED = 63 / 64


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return codes (..., blocks, BLOCK), int8 or uint8, as fp32, each block times its scale (..., blocks, 1)."""
    signed = codes.dtype == torch.int8
    values = codes.to(torch.float32)
    root = values.abs() * (1 / 128) if signed else values * (1 / 256)
    power = ((root.view(torch.int32) - _ONE) * 4 + _ONE).view(torch.float32)
    power = torch.where(values == 0, 0.0, power)
    return power * (torch.where(values < 0, -scales, scales) if signed else scales)


def encode(values: Tensor, noise: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes, still in fp32, and scales of fp32 values (..., blocks, BLOCK).

    Args:
        values: what to store, finite; not negative if unsigned.
        noise: uniform in [0, 1) for stochastic rounding, 0.5 for rounding to nearest, which gives decoded values their own codes back.
        signed: whether the codes are int8 or uint8. Unsigned, a positive value never becomes 0.
    """
    size = values.abs() if signed else values
    top = _TOP_SIGNED if signed else _TOP_UNSIGNED
    largest = size.amax(-1, keepdim=True).clamp(min=1e-30)  # whose reciprocal does not overflow
    part = size * (top / largest)
    root = (((part.view(torch.int32) - _ONE) >> 2) + _ONE).view(torch.float32)
    if signed:
        codes = (root * 128 + noise).floor().clamp(max=127)
        codes = torch.where(values < 0, -codes, codes)
    else:
        codes = torch.where(part > 0, (root * 256 + noise).floor().clamp(1, 255), 0.0)
    return codes, largest * (1 / top)
