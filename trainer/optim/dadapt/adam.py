"""Adam with D-Adaptation (Defazio & Mishchenko 2023, arXiv 2301.07733) in one pass, without host syncs.

With g the gradient, r the group's layer_scale, bc the bias correction or 1, q = sqrt(beta2) and dlr = min(d *
lr * bc, rate_max), a step is

    num += r * dlr * <g, s / (sqrt(v) + eps)>           the old s, v and d
    m    = beta1 * m + r * dlr * (1 - beta1) * g
    v    = beta2 * v + (1 - beta2) * g * g
    s    = q * s + dlr * (1 - q) * g
    l1  += r * |s|_1
    p    = p - decay * dlr * p - m / (sqrt(v) + eps)    decoupled decay; coupled: g = g + decay * p first

and, after all parameters, W = q * W + (1 - q) * num, d_hat = W / ((1 - q) * l1), d = max(d, min(d_hat, d *
growth_rate, d_max)).

Nothing in the update uses the new d. So every parameter is visited once, as soon as it has its gradient, even
inside backward; only the two sums wait for the end of the step. They are kept by tile and added in a fixed
order, so the order of the parameters does not show in them.

Only num and l1 need s, and their ratio survives sampling: s may be kept for one element drawn in each
`every`; both sums are then multiplied by `every`.

Two rules of the published optimizer are kept: a parameter without a gradient takes no part in a step; and
where l1 stays 0 (no gradient but zeros ever since the start) the step leaves the parameters, k, W and d
alone. A step at lr 0 changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    """Factor that removes a loss scale from the gradient."""
    coupled: Tensor
    """Decay added to the gradient."""
    gate: Tensor
    """0: the step changes nothing."""
    weight: Tensor
    """Factor on the group's sums: layer_scale."""
    out: Tensor | None
    """The step is out * m / (sqrt(v) + eps); None: 1."""


Settle = Callable[[str, Tensor], Tensor]


def _as_is(_: str, value: Tensor) -> Tensor:
    return value


def estimate(
    g: Tensor, s: Tensor, v: Tensor, c: Coefficients, settle: Settle = _as_is, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Update s in place by the gradient g, v being the old second moment.

    Return s, and g * s / (sqrt(v) + eps) of the old s. Each result passes through `settle`, with its name,
    before further use. Intermediate results, including the products, are written to `scratch` if given.
    """
    root = _root(v, scratch).add_(c.eps)
    products = settle("products", torch.div(s, root, out=scratch).mul_(g))
    return settle("s", s.mul_(c.keep_s).addcmul_(g, c.gain_s)), products


def advance(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    c: Coefficients,
    settle: Settle = _as_is,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update weights and moments in place by the gradient g, and return them."""
    m = settle("m", m.mul_(c.keep_m).addcmul_(g, c.gain_m))
    v = settle("v", v.mul_(c.keep_v).addcmul_(torch.mul(g, c.gain_v, out=scratch), g))
    root = _root(v, scratch).add_(c.eps)
    step = torch.div(m if c.out is None else m * c.out, root, out=scratch)
    p = settle("p", p.sub_(step.addcmul_(p, c.decay)))
    return p, m, v


def _root(v: Tensor, out: Tensor | None) -> Tensor:
    """Return the square root, on the CPU by its reciprocal: torch.sqrt starts threads there for any size."""
    if torch.compiler.is_compiling() or v.device.type != "cpu":
        return torch.sqrt(v, out=out)
    return torch.rsqrt(v, out=out).reciprocal_()


def adapt(
    scalars: Mapping[str, Tensor], num: Tensor, l1: Tensor, shared: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return W, d_hat, d, l1 and k after a step with these sums, and "learns", False if they do not count.

    d never falls, so an overflow of the sums must not reach it: such a step counts as one without a gradient.
    """
    root = math.sqrt(shared["betas"][1])
    w = root * scalars["numerator_weighted"] + (1 - root) * num
    d_hat = w / ((1 - root) * l1)
    d = torch.maximum(
        scalars["d"], (scalars["d"] * shared["growth_rate"]).clamp(max=shared["d_max"]).minimum(d_hat)
    )
    learns = (l1 > 0) & d_hat.isfinite()
    return {
        "numerator_weighted": w,
        "d_hat": d_hat,
        "d": d,
        "l1": l1,
        "k": scalars["k"] + 1,
        "learns": learns,
    }
