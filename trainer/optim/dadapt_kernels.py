"""The arithmetic of a D-Adaptation step on rows of elements: one function, which runs eagerly or inside a compiled kernel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.optim.quantized import BLOCK, decode, encode, give_hints, stored, to_bf16

ROW = 2048
"""Elements of one row of the flat state."""

Kernel = Callable[..., tuple[Tensor, Tensor]]


def row_width(state_bits: int, weights: torch.dtype) -> int:
    """Return how many elements a compiled kernel sums up at a time: a row, or a block where anything is rounded block by block."""
    return BLOCK if state_bits == 8 or weights == torch.bfloat16 else ROW


class Coefficients(NamedTuple):
    """The scalars of one group in one step, as 0-d tensors."""

    keep_m: Tensor
    gain_m: Tensor
    keep_v: Tensor
    gain_v: Tensor
    keep_s: Tensor
    gain_s: Tensor
    eps: Tensor
    decay: Tensor
    unscale: Tensor
    """What takes a loss scale out of the gradient."""
    coupled: Tensor
    """Decay that is added to the gradient."""


NEUTRAL = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, math.inf, 0.0, 1.0, 0.0)
"""Coefficients that leave everything as it is."""


def advance(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor, c: Coefficients, settle: Callable[[str, Tensor], Tensor] = lambda _, value: value
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Update p, m, v, s (rows, width) in place by the gradient g; return them, and g * s / (sqrt(v) + eps) of before.

    `settle` is shown each result by name before it is used further, and returns what to use.
    """
    products = settle("products", (s / _root(v).add_(c.eps)).mul_(g))
    m = settle("m", m.mul_(c.keep_m).addcmul_(g, c.gain_m))
    v = settle("v", v.mul_(c.keep_v).addcmul_(g * c.gain_v, g))
    s = settle("s", s.mul_(c.keep_s).addcmul_(g, c.gain_s))
    p = settle("p", p.sub_((m / _root(v).add_(c.eps)).addcmul_(p, c.decay)))
    return p, m, v, s, products


def _root(v: Tensor) -> Tensor:
    """Return the square root, on the CPU by way of its reciprocal: there torch's own is a library's that starts threads for any size."""
    return v.sqrt() if torch.compiler.is_compiling() or v.device.type != "cpu" else v.rsqrt().reciprocal_()


def advance_float(
    p: Tensor, g: Tensor, live: Tensor, table: Tensor, m: Tensor, v: Tensor, s: Tensor, *noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Run `advance` where `live` (rows, 1), whatever g is elsewhere; return the sums of products and |s| of each row, 0 elsewhere.

    Weights and gradients p, g are fp32, or bf16, for which a row is a block; noise is then as for `advance_bytes`.
    """
    held = {"m": m, "v": v, "s": s}

    def settle(name: str, value: Tensor) -> Tensor:
        if name in held:
            value = torch.where(live, value, held[name])
        return value if name == "p" else stored(value)

    c = Coefficients(*table.unbind())
    weights, g = _wide(p, g, c)
    weights, *moved, products = advance(weights, g, m.clone(), v.clone(), s.clone(), c, settle)
    # Stored values and sums that read one of them together are what leads torch's compiler to a single loop: one pass over memory.
    num, l1 = (products + 0.0 * moved[2]).sum(-1), moved[2].abs().sum(-1)
    for target, value in zip((*held.values(), p), (*moved, torch.where(live, _narrow(weights, p, *noise), p)), strict=True):
        target.copy_(value)
    return _of_live((num, l1), live)


def advance_bytes(
    p: Tensor, g: Tensor, live: Tensor, table: Tensor,
    codes_m: Tensor, codes_v: Tensor, codes_s: Tensor, exponents_m: Tensor, exponents_v: Tensor, exponents_s: Tensor,
    blocks: Tensor, columns: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do the same with state of 8 bits, a row being a block: codes (blocks, BLOCK), exponents (blocks, 1).

    Noise is the fractional part of blocks (blocks, 1) plus columns (2, 1, BLOCK), the first for the codes, the second for bf16 weights.
    """
    held = ((codes_m, exponents_m), (codes_v, exponents_v), (codes_s, exponents_s))
    m, v, s = (decode(*pair) for pair in held)
    c = Coefficients(*table.unbind())
    weights, g = _wide(p, g, c)
    if p.dtype == torch.bfloat16:
        g = stored(g)  # a loop that reads bf16 alone works on twice as many elements at once, in which shifting bits takes twice as long
    weights, m, v, s, products = advance(weights, g, m, v, s, c)
    noise = _fraction(blocks + columns[0])
    # Everything is computed before anything is written: the compiler then keeps it to two loops, the second for the codes.
    writes = [(p, torch.where(live, _narrow(weights, p, blocks, columns), p))]
    for values, (codes, exponents) in zip((m, v, s), held, strict=True):
        new_codes, new_exponents = encode(values, noise, signed=codes.dtype == torch.int8)
        writes.append((codes, torch.where(live, new_codes.to(torch.int32), codes.to(torch.int32)).to(codes.dtype)))
        writes.append((exponents, torch.where(live, new_exponents, exponents.to(torch.int32)).to(torch.uint8)))
    num, l1 = products.sum(-1), s.abs().sum(-1)
    for target, value in writes:
        target.copy_(value)
    return _of_live((num, l1), live)


def _wide(p: Tensor, g: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """Return weights and gradient in fp32, the gradient as the step sees it: unscaled, and with the coupled decay."""
    weights = p.to(torch.float32, copy=True)
    return weights, g.to(torch.float32) * c.unscale + weights * c.coupled


def _narrow(weights: Tensor, like: Tensor, *noise: Tensor) -> Tensor:
    if like.dtype == weights.dtype:
        return weights
    blocks, columns = noise
    return to_bf16(weights, _fraction(blocks + columns[1]))


def _fraction(value: Tensor) -> Tensor:
    return value - value.floor()


def _of_live(sums: tuple[Tensor, Tensor], live: Tensor) -> tuple[Tensor, Tensor]:
    num, l1 = (torch.where(live.squeeze(-1), value, 0.0) for value in sums)
    return num, l1


_OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 10_000, "realize_reads_threshold": 10_000}
"""Inductor's: compute again what two loops need rather than store it, since the loops are bound by memory."""

_compiled: dict[tuple[str, int, torch.dtype], Kernel | None] = {}


@torch.no_grad()  # as every step: the graph is for one of the two modes
def compiled_kernel(device: torch.device, state_bits: int, weights: torch.dtype) -> Kernel | None:
    """Return `advance_float` or `advance_bytes` compiled for fp32 or bf16 weights on this kind of device, None if that does not work here.

    The first call compiles for any number of rows above one and tries the result out, in some seconds (torch keeps it on disk). One
    graph serves every shape, group and optimizer. If it fails, or TORCH_COMPILE_DISABLE=1 forbids it, a warning of one line says so.
    For the meta device it is a function that does nothing, in as much memory as the compiled one.
    """
    if device.type == "meta":
        return _nothing
    key = (device.type, state_bits, weights)
    if key not in _compiled:
        try:
            _compiled[key] = _tried(device, state_bits, weights)
        except Exception as error:  # a missing or broken compiler raises anything, from OSError to torch's InductorError
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(f"torch.compile does not work here ({reason}): the optimizer runs without it, slower", stacklevel=2)
            _compiled[key] = None
    return _compiled[key]


def _nothing(p: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    num, l1 = (torch.zeros(len(p), device=p.device) for _ in range(2))
    return num, l1


def _tried(device: torch.device, state_bits: int, weights: torch.dtype) -> Kernel:
    import torch._dynamo

    if torch._dynamo.config.disable:
        raise RuntimeError("TORCH_COMPILE_DISABLE is set")
    give_hints()
    rows, width = 48, row_width(state_bits, weights)
    function: Kernel = advance_float if state_bits == 32 else advance_bytes

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    p, g = zeros(rows, width, dtype=weights) + 1, zeros(rows, width, dtype=weights) + 0.5
    by_row = [p, g, zeros(rows, 1, dtype=torch.bool) | True]
    if state_bits == 32:
        by_row += [zeros(rows, width) for _ in range(3)]
    else:
        by_row += [zeros(rows, width, dtype=kind) for kind in (torch.int8, torch.uint8, torch.int8)]
        by_row += [zeros(rows, 1, dtype=torch.uint8) for _ in range(3)]
    noise = [zeros(rows, 1), zeros(2, 1, width)] if width == BLOCK else []
    by_row += noise[:1]
    for tensor in by_row:
        torch._dynamo.mark_dynamic(tensor, 0)
    table = torch.tensor([0.9, 0.1, 0.99, 0.01, 0.99, 0.01, 1e-8, 0.0, 1.0, 0.0], device=device)
    kernel = torch.compile(function, fullgraph=True, options=_OPTIONS)
    _, l1 = kernel(*by_row[:3], table, *by_row[3:], *noise[1:])
    if not torch.allclose(l1, torch.full_like(l1, 0.005 * width)) or not (p < 1).all():
        raise RuntimeError("the compiled kernel gives wrong results")
    return kernel
