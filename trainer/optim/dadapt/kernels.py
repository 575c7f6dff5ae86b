"""The step through torch.compile, for the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.optim.dadapt.adam import Coefficients, advance, estimate
from trainer.optim.dadapt.quantized import BLOCK, decode, encode, give_hints, noise, stored, to_bf16
from trainer.optim.dadapt.state import TILE, Bank

_BLOCKS = TILE // BLOCK

Kernel = Callable[..., tuple[Tensor, Tensor]]


class CompiledKernel(NamedTuple):
    """The step through torch.compile."""

    whole: Kernel
    """advance_float or advance_bytes."""
    few: Kernel | None
    """estimate_bytes, where s is kept for drawn elements."""

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
        """Run on two or more tiles, from `first` on; return the two sums of each, fp64. Noise: by block of the bank, and by column."""
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
            few = [s, exponents, v.gather(1, drawn), powers.gather(1, drawn // BLOCK)]
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
    """Return how many elements a compiled kernel sums up at a time: a tile, or a block where anything is rounded block by block."""
    return BLOCK if bits == 8 or weights == torch.bfloat16 else TILE


def advance_float(
    p: Tensor, g: Tensor, live: Tensor, table: Tensor, noises: list[Tensor], state: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Advance fp32 state m, v, s (rows, width) where `live` (rows, 1), whatever g is elsewhere; without s for AdamW.

    Return the sums of products and of |s| of each row, 0 elsewhere. Weights and gradients p, g are fp32, or bf16, for which a row is a
    block. Noise is the fractional part of noises[0] (rows, 1) plus noises[1] (2, 1, BLOCK), the first for codes, the second for bf16.
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
    """Do the same with state of 8 bits, a row being a block: codes (blocks, BLOCK) and exponents (blocks, 1) of m, v and perhaps s."""
    held = list(zip(state[::2], state[1::2], strict=True))
    m, v, *rest = (decode(*pair) for pair in held)
    c = Coefficients(*table.unbind())
    weights, g = _wide(p, g, c)
    if p.dtype == torch.bfloat16:
        g = stored(
            g
        )  # a loop that reads bf16 alone works on twice as many elements at once, in which shifting bits takes twice as long
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
    """Advance s (tiles, few) of drawn elements, whose weights and gradients are p, g; 8 bits, one exponent for a tile.

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
    """Return what is to be written where."""
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
    """Return weights and gradient in fp32, the gradient as the step sees it: unscaled, and with the coupled decay."""
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

_compiled: dict[tuple[int, int, torch.dtype], CompiledKernel | None] = {}


@torch.no_grad()  # as every step: the graph is for one of the two modes
def compiled_kernel(bits: int, every: int, weights: torch.dtype) -> CompiledKernel | None:
    """Return the step compiled for fp32 or bf16 weights on the CPU; None if that does not work here.

    The first call compiles for any number of rows above one and tries the result out, in some seconds (torch
    keeps it on disk). One graph serves every shape, group and optimizer. If it fails, or
    TORCH_COMPILE_DISABLE=1 forbids it, a warning of one line says so.
    """
    key = bits, every, weights
    if key not in _compiled:
        try:
            _compiled[key] = _tried(bits, every, weights)
        except (
            Exception
        ) as error:  # a missing or broken compiler raises anything, from OSError to torch's InductorError
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(
                f"torch.compile does not work here ({reason}): the optimizer runs without it, slower",
                stacklevel=2,
            )
            _compiled[key] = None
    return _compiled[key]


def _tried(bits: int, every: int, weights: torch.dtype) -> CompiledKernel:
    import torch._dynamo

    if torch._dynamo.config.disable:
        raise RuntimeError("TORCH_COMPILE_DISABLE is set")
    give_hints()
    whole: Kernel = torch.compile(
        advance_float if bits == 32 else advance_bytes, fullgraph=True, options=_OPTIONS
    )
    few: Kernel | None = (
        torch.compile(estimate_bytes, fullgraph=True, options=_OPTIONS) if every > 1 else None
    )
    kernel = CompiledKernel(whole, few)
    tiles = 48
    bank = Bank(torch.device("cpu"), weights, tiles, bits, every)
    draws = noise(0, 0, tiles * _BLOCKS, bank.device) if row_width(bits, weights) == BLOCK else None
    p, g = (torch.full((tiles, TILE), value, dtype=weights) for value in (1.0, 0.5))
    table = torch.tensor([0.9, 0.1, 0.99, 0.01, 0.99, 0.01, 1e-8, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    _, l1 = kernel.advance(bank, 0, p, g, torch.ones(tiles, 1, dtype=torch.bool), table, draws)
    if (every and not torch.allclose(l1, torch.full_like(l1, 0.005 * (TILE // every)))) or not (p < 1).all():
        raise RuntimeError("the compiled kernel gives wrong results")
    return kernel
