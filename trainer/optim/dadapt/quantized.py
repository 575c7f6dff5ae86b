"""Stochastic rounding, of weights to bf16 and of optimizer state to eight bits.

State takes one byte for each element, and one for the exponent of each block of `BLOCK` elements.

A code k of n levels stands for y(k / n) * 2^e, where e is the block's exponent and y is the fourth power with
straight lines between the powers of two: the bits of a float, read as an integer, are its logarithm in
straight pieces, and four times that is the fourth power's. So neither direction needs a root or a table, only
shifts and additions. Steps are 1 to 3% of the value in the upper four octaves of an unsigned block (3 to 6%
signed), twice that in the next four, and so on down to 2^-32 (2^-28) of 2^e.

Rounding is stochastic, since a running mean with beta 0.999 moves by less than a step at a time and would
never leave its code. The straight pieces make it unbiased: between neighbouring codes above 2^-20 of the
largest value, the mean of what is stored is the value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share an exponent."""

_BIAS = 127
_FRACTION = 23
"""fp32: 1.0 has the exponent bits 127, above 23 bits of fraction."""

_ONE = _BIAS << _FRACTION
_SIGN = -(1 << 31)
_SIGNED_LEVELS, _UNSIGNED_LEVELS = 7, 8
"""The logarithms of the number of levels."""

_SMALLEST_EXPONENT = 40
"""Biased: a block's unit is at least 2^-87, below which its smallest codes would leave fp32."""

_store: Callable[..., Tensor] | None = None
"""The compiler's operator behind `stored`."""


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """Return codes (..., BLOCK), int8 or uint8, of blocks with biased exponents (..., 1), uint8, as fp32."""
    signed = codes.dtype == torch.int8
    unit = stored((exponents.to(torch.int32) << _FRACTION).view(torch.float32))
    level = codes.to(torch.float32)
    bits = (
        (level.abs() if signed else level).view(torch.int32).sub(_offset(signed)).clamp_(min=0)
    )  # below 0 for the code 0 alone
    size = (bits << 2).view(torch.float32).mul_(unit)
    return _signed(size, level) if signed else size


def encode(values: Tensor, noise: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes (fp32, to be truncated) and biased exponents (int32) of fp32 values (..., BLOCK).

    Args:
        values: what to store, finite; not negative if unsigned.
        noise: uniform in [0, 1 - 2^-17] for stochastic rounding; 0.5 rounds to nearest.
        signed: int8 codes, -127 to 127; else uint8, 1 to 255: an unsigned 0 becomes the smallest value, since
            first moments are divided by the roots of second ones.
    """
    size = values.abs() if signed else values
    # The largest code stands for 31/32 (unsigned 63/64) of the unit: with the largest value a little below
    # it, no code is too large.
    bound = size.amax(-1, keepdim=True) * ((32 / 31 if signed else 64 / 63) * (1 + 2e-5))
    exponents = stored(((bound.view(torch.int32) >> _FRACTION) + 1).clamp(min=_SMALLEST_EXPONENT))
    part = size * stored(((2 * _BIAS - exponents) << _FRACTION).view(torch.float32))
    bits = (part.view(torch.int32) >> 2).add_(_offset(signed))
    level = (bits if signed else bits.clamp_(min=_ONE)).view(torch.float32).add_(noise)
    return _signed(level, values) if signed else level, exponents


def _offset(signed: bool) -> int:
    """Return the bits of a code, y^-1 times 2^levels, minus a quarter of the bits of its value."""
    return _ONE - (_ONE >> 2) + ((_SIGNED_LEVELS if signed else _UNSIGNED_LEVELS) << _FRACTION)


def _signed(size: Tensor, like: Tensor) -> Tensor:
    return (like.view(torch.int32) & _SIGN).bitwise_or_(size.view(torch.int32)).view(torch.float32)


def to_bf16(values: Tensor, noise: Tensor) -> Tensor:
    """Return fp32 values rounded to bf16 by noise, uniform in [0, 1): on average unchanged."""
    steps = (noise * (1 << 16)).to(torch.int32)
    return (
        ((values.view(torch.int32) + steps) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    )  # bf16 is the upper 16 bits of fp32


def stored(value: Tensor) -> Tensor:
    """Make torch's CPU compiler store this value instead of computing it again at each use."""
    if _store is None or value.device.type != "cpu" or not torch.compiler.is_compiling():
        return value
    return _store(value, value.stride())


_COLUMNS = 0x6A09E667


def noise(step: int, first: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the step's noise as two fp32 parts: by block from `first` on, (blocks, 1), and by column.

    The second part, (2, 1, BLOCK), is for codes and for bf16 weights. The fractional part of their sum is
    uniform in [0, 1), and independent for any two elements. All are multiples of 2^-16, the second with
    another 2^-17: their sums are exact, so that every device and every order agrees.
    """
    if device.type == "meta":
        return torch.empty(blocks, 1, device=device), torch.empty(2, 1, BLOCK, device=device)
    key = int(mixed(torch.tensor(step & 0xFFFFFFFF).to(torch.int32)))
    by_block = mixed(torch.arange(first, first + blocks, dtype=torch.int32, device=device) ^ key)
    by_column = mixed(torch.arange(2 * BLOCK, dtype=torch.int32, device=device) + (key ^ _COLUMNS))
    rows, columns = ((bits >> 16 & 0xFFFF).to(torch.float32) * 2**-16 for bits in (by_block, by_column))
    return rows.view(-1, 1), columns.view(2, 1, BLOCK) + 2**-17


def mixed(x: Tensor) -> Tensor:
    """Permute 32-bit numbers so that each bit changes half of the others (lowbias32, C. Wellons); int32.

    The masks make the shifts of signed numbers logical ones.
    """
    x = (x ^ (x >> 16 & 0xFFFF)).mul_(0x21F0AAAD)
    x.bitwise_xor_(x >> 15 & 0x1FFFF).mul_(0xD35A2D97 - (1 << 32))
    return x.bitwise_xor_(x >> 15 & 0x1FFFF)


def give_hints() -> None:
    """Enable `stored` if this torch has its operator; without it kernels are slower, with equal results."""
    import torch._inductor.inductor_prims

    global _store
    _store = getattr(torch.ops.prims, "inductor_force_stride_order", None)
