"""The step through torch.compile, for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.optim.dadapt.adam import Coefficients, advance, estimate
from trainer.optim.dadapt.quantized import BLOCK, decode, encode, give_hints, stored, to_bf16
from trainer.optim.dadapt.state import TILE, Bank

_BLOCKS = TILE // BLOCK
_BLOCK_BITS = BLOCK.bit_length() - 1

Kernel = Callable[..., tuple[Tensor, Tensor]]


class CompiledKernel(NamedTuple):
    """The step through torch.compile."""

    whole: Kernel
    """`advance_float` or `advance_bytes`."""
    few: Kernel | None
    """`estimate_bytes` if s is kept for drawn elements only."""

    def advance(
        self,
        bank: Bank,
        first: int,
        p: Tensor,
        g: Tensor,
        live: Tensor,
        table: Tensor,
        noises: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Advance two or more tiles, from `first` on, and return the two sums of each, fp64.

        Noise: by block of the bank, and by column.
        """
        tiles = len(p)
        width = row_width(bank.bits, bank.weights)
        parts = TILE // width
        draws = [noises[0][first * parts : (first + tiles) * parts], noises[1]] if noises else []

        def held(name: str) -> list[Tensor]:
            data, exponents = (each[first : first + tiles] for each in bank.held[name])
            return [data.view(-1, width), *([exponents.view(-1, 1)] if bank.bits == 8 else [])]

        names = ["exp_avg", "exp_avg_sq"] + (["s"] if bank.every == 1 else [])
        state = [tensor for name in names for tensor in held(name)]
        by_row = live.expand(tiles, parts).reshape(-1, 1).contiguous()
        sums: tuple[Tensor, Tensor] | None = None
        if self.few:  # before v changes
            drawn = bank.drawn(first, tiles)
            gs, ps = g.gather(1, drawn), p.gather(1, drawn)
            (s, exponents), (v, powers) = (
                [each[first : first + tiles] for each in bank.held[name]] for name in ("s", "exp_avg_sq")
            )
            few = [s, exponents, v.gather(1, drawn), powers.gather(1, drawn >> _BLOCK_BITS)]
            sums = _call(
                self.few, ps, gs, live, table, [draws[0][::_BLOCKS], draws[1][0, :, : bank.few]], few
            )
        others = _call(self.whole, p.view(-1, width), g.view(-1, width), by_row, table, draws, state)
        num, l1 = (each.view(tiles, -1).sum(1, dtype=torch.float64) for each in sums or others)
        return num, l1


def _call(
    kernel: Kernel,
    p: Tensor,
    g: Tensor,
    live: Tensor,
    table: Tensor,
    noises: list[Tensor],
    state: list[Tensor],
) -> tuple[Tensor, Tensor]:
    for tensor in (p, g, live, *noises[:1], *state):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one graph for any number of rows
    return kernel(p, g, live, table, noises, state)


def row_width(bits: int, weights: torch.dtype) -> int:
    """Return the elements of a compiled kernel's row: a tile, or a block if values are rounded by block."""
    return BLOCK if bits == 8 or weights == torch.bfloat16 else TILE


def advance_float(
    p: Tensor, g: Tensor, live: Tensor, table: Tensor, noises: list[Tensor], state: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Advance fp32 state m, v, s (rows, width) of `live` rows (rows, 1); AdamW has no s.

    Return the sums of products and of |s| of each row, 0 for rows that are not live. Weights and gradients
    are fp32, or bf16 in rows of a block. Noise is the fractional part of noises[0] (rows, 1) plus noises[1]
    (2, 1, BLOCK), of which the first is for codes and the second for bf16.
    """
    held: dict[str, Tensor] = dict(zip(("m", "v", "s"), state, strict=False))

    def settle(name: str, value: Tensor) -> Tensor:
        if name in held:
            value = torch.where(live, value, held[name])
        return value if name == "p" else stored(value)

    c = Coefficients(*table.unbind())
    weights, g = _wide(p, g, c)
    num = l1 = products = weights.new_zeros(len(weights), 1)
    moved: dict[str, Tensor] = {}
    if "s" in held:
        moved["s"], products = estimate(g, held["s"].clone(), held["v"], c, settle)
    weights, moved["m"], moved["v"] = advance(weights, g, held["m"].clone(), held["v"].clone(), c, settle)
    if "s" in held:
        # Stored values and sums that read one of them together are what leads torch's compiler to a single
        # loop: one pass over memory.
        num, l1 = (products + 0.0 * moved["s"]).sum(-1), moved["s"].abs().sum(-1)
    for name, value in moved.items():
        held[name].copy_(value)
    p.copy_(torch.where(live, _narrow(weights, p, noises), p))
    return _of_live(num, l1, live)


def advance_bytes(
    p: Tensor, g: Tensor, live: Tensor, table: Tensor, noises: list[Tensor], state: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Do the same with 8-bit state: codes (blocks, BLOCK) and exponents (blocks, 1) of m, v and perhaps s."""
    held = list(zip(state[::2], state[1::2], strict=True))
    m, v, *rest = (decode(*pair) for pair in held)
    c = Coefficients(*table.unbind())
    weights, g = _wide(p, g, c)
    if p.dtype == torch.bfloat16:
        # A loop that reads only bf16 takes twice as many elements at once, and shifts bits at half the speed.
        g = stored(g)
    num = l1 = products = weights.new_zeros(len(weights), 1)
    if rest:
        rest[0], products = estimate(g, rest[0], v, c)
    weights, m, v = advance(weights, g, m, v, c)
    # Everything is computed before anything is written: the compiler then keeps it to two loops, the second
    # for the codes.
    writes = [(p, torch.where(live, _narrow(weights, p, noises), p))]
    writes += _encoded([m, v, *rest], held, _fraction(noises[0] + noises[1][0]), live)
    if rest:
        num, l1 = products.sum(-1), rest[0].abs().sum(-1)
    for target, value in writes:
        target.copy_(value)
    return _of_live(num, l1, live)


def estimate_bytes(
    p: Tensor, g: Tensor, live: Tensor, table: Tensor, noises: list[Tensor], state: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Advance 8-bit s (tiles, few) of drawn elements, with one exponent a tile; p and g are theirs.

    State: codes and exponents of s, and of v, the exponents of which are by element.
    """
    s, v = decode(*state[:2]), decode(*state[2:])
    c = Coefficients(*table.unbind())
    _, g = _wide(p, g, c)
    s, products = estimate(g, s, v, c)
    writes = _encoded([s], [(state[0], state[1])], _fraction(noises[0] + noises[1]), live)
    num, l1 = products.sum(-1), s.abs().sum(-1)
    for target, value in writes:
        target.copy_(value)
    return _of_live(num, l1, live)


def _encoded(
    values: Sequence[Tensor], held: Sequence[tuple[Tensor, Tensor]], draws: Tensor, live: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return targets and the values to write to them."""
    writes: list[tuple[Tensor, Tensor]] = []
    for value, (codes, exponents) in zip(values, held, strict=True):
        new_codes, new_exponents = encode(value, draws, signed=codes.dtype == torch.int8)
        writes.append(
            (codes, torch.where(live, new_codes.to(torch.int32), codes.to(torch.int32)).to(codes.dtype))
        )
        writes.append(
            (exponents, torch.where(live, new_exponents, exponents.to(torch.int32)).to(torch.uint8))
        )
    return writes


def _wide(p: Tensor, g: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """Return weights and gradient in fp32, the gradient unscaled and with the coupled decay."""
    weights = p.to(torch.float32, copy=True)
    return weights, g.to(torch.float32) * c.unscale + weights * c.coupled


def _narrow(weights: Tensor, like: Tensor, noises: list[Tensor]) -> Tensor:
    if like.dtype == weights.dtype:
        return weights
    return to_bf16(weights, _fraction(noises[0] + noises[1][1]))


def _fraction(value: Tensor) -> Tensor:
    return value - value.floor()


def _of_live(num: Tensor, l1: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    num, l1 = (torch.where(live, sums.view(-1, 1), 0.0) for sums in (num, l1))
    return num, l1


_OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 10_000, "realize_reads_threshold": 10_000}
"""Inductor's: compute again what two loops need rather than store it, since the loops are bound by memory."""


def compiles(bank: Bank) -> bool:
    """Return whether there is a compiled step for a bank."""
    return bank.device.type == "cpu" and bank.dtype == torch.float32 and (bank.bits == 8 or bank.every < 2)


def compile_kernel(bits: int, every: int, options: Mapping[str, Any]) -> CompiledKernel:
    """Return the step through torch.compile with these further options; the first call with a dtype compiles.

    Raises:
        RuntimeError: TORCH_COMPILE_DISABLE=1 forbids it.
    """
    import torch._dynamo

    if torch._dynamo.config.disable:
        raise RuntimeError("TORCH_COMPILE_DISABLE is set")
    give_hints()
    step = advance_float if bits == 32 else advance_bytes
    whole: Kernel = torch.compile(step, fullgraph=True, options={**_OPTIONS, **options})
    few: Kernel | None = (
        torch.compile(estimate_bytes, fullgraph=True, options=_OPTIONS) if every > 1 else None
    )
    return CompiledKernel(whole, few)
