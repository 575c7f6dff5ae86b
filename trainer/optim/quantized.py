"""Eight-bit storage of optimizer state: one byte for each element, and one for the exponent of each block of `BLOCK` elements.

A code k of n levels stands for y(k / n) * 2^e, where e is the block's exponent and y is the fourth power with straight lines between
the powers of two: the bits of a float, read as an integer, are its logarithm in straight pieces, and four times that is the fourth
power's. So neither direction needs a root or a table, only shifts and additions. Steps are 1 to 3% of the value in the upper four
octaves of an unsigned block (3 to 6% signed), twice that in the next four, and so on down to 2^-32 (2^-28) of 2^e.

Rounding is stochastic, since a running mean with beta 0.999 moves by less than a step at a time and would never leave its code. The
straight pieces make it unbiased: between neighbouring codes above 2^-20 of the largest value, the mean of what is stored is the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share an exponent."""

_BIAS = 127
_FRACTION = 23
"""fp32: 1.0 has the exponent bits 127, above 23 bits of fraction."""

_ONE = _BIAS << _FRACTION
_FOURTH_POWER = ((-3 * _ONE + (1 << 31)) % (1 << 32)) - (1 << 31)
"""4 * (bits - _ONE) + _ONE is (bits << 2) plus this, in 32 bits that wrap around."""
_FOURTH_ROOT = _ONE - (_ONE >> 2)
"""((bits - _ONE) >> 2) + _ONE is (bits >> 2) plus this."""

_SMALLEST_EXPONENT = 40
"""Biased: a block's unit is at least 2^-87, below which its smallest codes would leave fp32."""


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """Return codes (..., BLOCK), int8 or uint8, of blocks with biased exponents (..., 1), uint8, as fp32."""
    signed = codes.dtype == torch.int8
    levels = codes.to(torch.int32)
    unit = (exponents.to(torch.int32) << _FRACTION).view(torch.float32)
    root = (levels.abs() if signed else levels).to(torch.float32) * (1 / 128 if signed else 1 / 256)
    power = ((root.view(torch.int32) << 2) + _FOURTH_POWER).view(torch.float32)
    power = torch.where(levels == 0, 0.0, power)
    return power * (torch.where(levels < 0, -unit, unit) if signed else unit)


def encode(values: Tensor, noise: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes and biased exponents, in int32, of fp32 values (..., BLOCK).

    Args:
        values: what to store, finite; not negative if unsigned.
        noise: uniform in [0, 1 - 2^-20] for stochastic rounding; 0.5 rounds to nearest.
        signed: whether the codes are for int8, -127 to 127, or for uint8, 1 to 255: an unsigned 0 becomes the smallest value, since
            first moments are divided by the roots of second ones.
    """
    size = values.abs() if signed else values
    largest = size.amax(-1, keepdim=True)
    # The largest code stands for 31/32 (unsigned 63/64) of the unit: the largest value must not be above it, but for the last bits.
    above = largest * ((32 / 31 if signed else 64 / 63) * (1 - 1e-6))
    exponents = ((above.view(torch.int32) >> _FRACTION) + 1).clamp(min=_SMALLEST_EXPONENT)
    part = size * ((2 * _BIAS - exponents) << _FRACTION).view(torch.float32)
    root = ((part.view(torch.int32) >> 2) + _FOURTH_ROOT).view(torch.float32)
    codes = (root * (128 if signed else 256) + noise).to(torch.int32).clamp(max=127 if signed else 255)
    codes = torch.where(values < 0, -codes, codes) if signed else codes.clamp(min=1)
    return codes, exponents
